"""How a person is named in silver and gold: by the log's user, or by an anonymous id of nobody known.

A user keeps the id that the log has. An anonymous id is a person of its own under a name that no user
has: `anonymous:` and the id. A user id that looks like such a name, behind any number of `~`, gets one
`~` more, so that no two of all are the same.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

ANONYMOUS, SIGN = "anonymous:", "~"


def of_users(users: pa.Array) -> pa.Array:
    """The persons of users; null stays null."""
    alike = pc.starts_with(pc.utf8_ltrim(users, SIGN), ANONYMOUS)
    if not pc.any(alike).as_py():
        return users
    return pc.if_else(alike, pc.binary_join_element_wise(SIGN, users, ""), users)


def of_anonymous(ids: pa.Array) -> pa.Array:
    """The persons of anonymous ids that belong to no user; null stays null."""
    return pc.binary_join_element_wise(pa.scalar(ANONYMOUS), ids, "")


def said_by_log(users: pa.Array, anonymous_ids: pa.Array) -> pa.Array:
    """Whose events are as far as each says it itself: the user, else the anonymous id's name."""
    if not users.null_count:
        return users
    return pc.coalesce(users, of_anonymous(anonymous_ids))
