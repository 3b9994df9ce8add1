"""What must hold of `silver.identities` and of the persons in `silver.events`."""

from expectations.check import Check

OF_USER = (
    "CASE WHEN trim(LEADING '~' FROM {x}) LIKE 'anonymous:%' THEN concat('~', {x}) ELSE {x} END"
)
"""The person of a user (`jobs/core/person_ids.py`), in SQL as Spark and DuckDB understand it."""

WRONG_PERSONS = f"""
SELECT e.event_id FROM events e LEFT JOIN identities i
    ON e.log_user_id IS NULL AND i.anonymous_id = e.anonymous_id
    AND (i.from_ts IS NULL OR e.event_ts >= i.from_ts)
    AND (i.to_ts IS NULL OR e.event_ts < i.to_ts)
WHERE e.user_id IS DISTINCT FROM CASE
    WHEN e.log_user_id IS NOT NULL THEN {OF_USER.format(x="e.log_user_id")}
    WHEN i.user_id IS NOT NULL THEN {OF_USER.format(x="i.user_id")}
    ELSE concat('anonymous:', e.anonymous_id) END
"""
"""SQL over `events` (rows of `silver.events`) and `identities`: the events that are somebody else's."""

BROKEN_LINKS = """
SELECT anonymous_id FROM (
    SELECT *, lag(to_ts) OVER w AS before_to, lag(user_id) OVER w AS before_user,
           lag(since_ts) OVER w AS before_since
    FROM identities WINDOW w AS (PARTITION BY anonymous_id ORDER BY since_ts)
)
WHERE NOT (
    (from_ts IS NULL OR from_ts <= since_ts) AND (to_ts IS NULL OR to_ts > since_ts)
    AND (before_since IS NULL OR coalesce(
        before_to = since_ts AND from_ts = since_ts AND before_user <> user_id, false))
)
"""
"""SQL over `identities`: links that do not begin where the one before ends, or are of one user. (Of the
last one `to_ts` is null: it is asked where a next one is.)"""

_NAMED = """
named AS (
    SELECT l.anonymous_id, l.login_ts, max(l.user_id) AS user_id FROM logins l GROUP BY l.anonymous_id, l.login_ts
)"""
AGAINST_LOGINS = {
    "last": f"""
WITH {_NAMED}
SELECT n.anonymous_id FROM named n LEFT JOIN identities i
    ON i.anonymous_id = n.anonymous_id AND i.since_ts <= n.login_ts AND (i.to_ts IS NULL OR n.login_ts < i.to_ts)
WHERE i.user_id IS DISTINCT FROM n.user_id
UNION ALL
SELECT i.anonymous_id FROM identities i LEFT JOIN named n
    ON n.anonymous_id = i.anonymous_id AND n.login_ts = i.since_ts AND n.user_id = i.user_id
WHERE n.login_ts IS NULL
""",
    "first": f"""
WITH {_NAMED}, earliest AS (SELECT anonymous_id, min(login_ts) AS login_ts FROM named GROUP BY anonymous_id),
wanted AS (
    SELECT n.* FROM named n JOIN earliest e ON e.anonymous_id = n.anonymous_id AND e.login_ts = n.login_ts
)
SELECT coalesce(w.anonymous_id, i.anonymous_id) FROM wanted w FULL OUTER JOIN identities i
    ON i.anonymous_id = w.anonymous_id
WHERE (w.login_ts = i.since_ts AND w.user_id = i.user_id) IS NOT TRUE
""",
}
"""SQL over `identities` and `logins` (`anonymous_id, user_id, login_ts`): links that no login makes, and logins
that are another user's by the links. By the rule; a table's rows are `logins` under `last`."""


def checks() -> tuple[Check, ...]:
    return (
        Check(
            name="link_is_key",
            says="an anonymous id has one link at a time",
            unique=("anonymous_id", "since_ts"),
        ),
        Check(
            name="ids_are_there",
            says="a link has an anonymous id, a user and a time",
            holds="coalesce(length(anonymous_id) > 0 AND length(user_id) > 0 "
            "AND since_ts IS NOT NULL, false)",
        ),
        Check(
            name="links_follow",
            says="of an anonymous id's links one begins where the one before ends, and is of another "
            "user",
        ),
        Check(
            name="links_are_the_logins",
            says="every link begins with a login, and every login is its user's by the links",
        ),
    )


def checks_of_events() -> tuple[Check, ...]:
    """Of `silver.events`."""
    return (
        Check(name="event_id_is_key", says="an event is in the table once", unique=("event_id",)),
        Check(
            name="persons_are_there",
            says="an event has a person, and the log's user or anonymous id",
            holds="coalesce(length(user_id) > 0 AND coalesce(log_user_id, anonymous_id) IS NOT NULL "
            "AND event_ts IS NOT NULL, false)",
        ),
        Check(
            name="persons_are_theirs",
            says="the person is the log's user, else the one whom silver.identities names, else the "
            "anonymous id",
        ),
        Check(
            name="people_balance",
            says="events of silver.events = events of bronze.events",
        ),
    )
