"""Who gets the compute and who gets the I/O when several requests want both: one policy, one file, one line here."""

from __future__ import annotations

from cakekv.errors import BadInput
from cakekv.restore.priority.base import Kind, Policy, RequestState, Shares
from cakekv.restore.priority.cake import CakeOrder
from cakekv.restore.priority.fcfs import FirstComeFirstServed
from cakekv.restore.priority.marginal_saving import MarginalSaving
from cakekv.restore.priority.turns import Turns

__all__ = ["POLICIES", "Kind", "Policy", "RequestState", "Shares", "Turns", "open_policy"]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (FirstComeFirstServed, CakeOrder, MarginalSaving)
}


def open_policy(name: str, starvation_s: float = 10.0) -> Policy:
    """The policy called `name`.

    Parameters
    ----------
    name : str
        A key of `POLICIES`.
    starvation_s : float
        Age from which on a request is served in order of arrival, in seconds.

    Raises
    ------
    BadInput
        There is no such policy, or the bound is negative.
    """
    if name not in POLICIES:
        raise BadInput(f"there is no priority policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name](starvation_s)
