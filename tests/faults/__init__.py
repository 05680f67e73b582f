"""Faults, counted: killed writers and servers, cut links, full disks, damage, interrupts, a soak; more: `--long`."""
