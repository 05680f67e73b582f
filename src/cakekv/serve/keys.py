"""API keys, and the tenant that each stands for."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from pathlib import Path

from cakekv.errors import BadInput
from cakekv.serve.errors import ApiError


class Keys:
    """Who may ask.

    Parameters
    ----------
    key : str or None
        One key, for the server's own tenant.
    tenants : mapping
        From further keys to the names of their tenants, which share no chunks.

    Without any key, everybody may ask.
    """

    def __init__(self, key: str | None = None, tenants: Mapping[str, str] | None = None) -> None:
        self._tenants: dict[bytes, str | None] = {key.encode(): None} if key else {}
        self._tenants.update((other.encode(), tenant) for other, tenant in (tenants or {}).items())

    def tenant(self, authorization: str | None) -> str | None:
        """Whose key a request bears; None for the server's own tenant. Raises `ApiError` if it bears none of them."""
        if not self._tenants:
            return None
        scheme, _, given = (authorization or "").strip().partition(" ")
        bearer = given.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
        found = [tenant for key, tenant in self._tenants.items() if hmac.compare_digest(key, bearer)]
        if not found:
            what = "a wrong API key" if bearer else "no API key: send it as `Authorization: Bearer KEY`"
            raise ApiError(
                401, f"the request has {what}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        return found[0]


def read_keys(path: Path) -> dict[str, str]:
    """Keys and their tenants from a file: on each line a tenant's name and a key of it; `#` begins a comment.

    Raises
    ------
    BadInput
        The file cannot be read, or has something else in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise BadInput(f"the API keys cannot be read from {path}: {error}") from error
    tenants: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isascii():
            raise BadInput(
                f"line {number} of {path} must be a tenant's name and a key of plain letters, such as: ann s3cret"
            )
        if words[1] in tenants:
            raise BadInput(f"line {number} of {path} has a key that was there before: each must be for one tenant")
        tenants[words[1]] = words[0]
    if not tenants:
        raise BadInput(f"there is no API key in {path}: write a tenant's name and a key on each line")
    return tenants
