"""A restore's report for people and machines: picture, table, live bar, trace, log event, metrics."""
