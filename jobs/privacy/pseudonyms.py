"""Who a line is about: ids hashed as they are read, and people who must not come back.

A pseudonym is an HMAC-SHA256 of source and user id under `SESSIONMILL_ID_KEY`; without the key it
cannot be made again or tried out. `ops.forgotten` keeps the pseudonyms of erased users
(`jobs forget`), so that a file that is delivered again does not bring them back, and a check of the
key, so that another key is noticed rather than obeyed.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from jobs.core.errors import SettingsError
from jobs.core.settings import settings
from jobs.core.tables import FORGOTTEN
from jobs.privacy.person import writings

if TYPE_CHECKING:
    from jobs.lake.context import Context

PREFIX, ANONYMOUS_PREFIX = "u-", "a-"
WORD = re.compile(r"[^\s,;|\"'{}\[\]()<>:=&\t]+")
WORDS = 8  # ours: so many words of an id are tried, where only its hash is known
HOW = (
    "set SESSIONMILL_ID_KEY to a secret of at least 32 characters (python -c 'import secrets; "
    "print(secrets.token_hex(32))'), and keep it: every later run of this source needs the same key"
)


@dataclass(frozen=True)
class Privacy:
    """What ingestion obeys; sent to the workers that read files.

    Args:
        hashes: whether user ids and anonymous ids become pseudonyms.
        forgotten: pseudonyms of those whose lines are skipped; of an anonymous id those lines that have
            no user.
    """

    key: bytes
    source: str
    hashes: bool
    forgotten: frozenset[str]

    def pseudonym(self, user: str) -> str:
        return PREFIX + self._keyed(f"{self.source}\0{user}")

    def of_anonymous(self, name: str) -> str:
        """The pseudonym of an anonymous id."""
        return ANONYMOUS_PREFIX + self._keyed(f"{self.source}\0anonymous\0{name}")

    def _keyed(self, text: str) -> str:
        told = text.encode("utf-8", "surrogatepass")
        return hmac.new(self.key, told, hashlib.sha256).hexdigest()[:32]

    def hashed(self, users: Any, names: Any) -> tuple[pa.Array, pa.Array]:
        """The pseudonyms of users and of anonymous ids; null stays null."""
        made = []
        for column, how in ((users, self.pseudonym), (names, self.of_anonymous)):
            coded = column.dictionary_encode()
            coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
            each = pa.array([how(one) for one in coded.dictionary.to_pylist()], pa.string())
            made.append(each.take(coded.indices))
        return made[0], made[1]

    def of_links(self, names: Any, users: Any) -> tuple[Any, Any]:
        """Anonymous ids and users of links, hashed if so; null where one of them was forgotten."""
        of_users, of_names = self.hashed(users, names)
        gone = self._gone(of_users, of_names)
        if self.hashes:
            users, names = of_users, of_names
        return pc.if_else(gone, None, names), pc.if_else(gone, None, users)

    def _gone(self, users: pa.Array, names: pa.Array) -> pa.Array:
        forgotten = pa.array(sorted(self.forgotten), pa.string())
        return pc.or_(pc.is_in(users, forgotten), pc.is_in(names, forgotten))

    @property
    def key_check(self) -> str:
        return hmac.new(self.key, b"sessionmill: is it this key?", hashlib.sha256).hexdigest()[:16]

    def guarded(self, batches: Iterable[pa.RecordBatch]) -> Generator[pa.RecordBatch, None, int]:
        """The records of one file without those of erased users; user ids hashed, if so.

        Returns:
            How many records were skipped; the file's facts count them apart.
        """
        skipped = 0
        for batch in batches:
            kinds = batch.column("kind").to_pylist()
            users, names = self.hashed(batch.column("user_id"), batch.column("anonymous_id"))
            alone = pc.if_else(pc.is_null(users), names, None)
            gone = pc.fill_null(self._gone(users, alone), False)
            if "unparsable" in kinds and self.forgotten:
                raw = batch.column("raw").to_pylist()
                named = [
                    kind == "unparsable" and self.names_forgotten(text or "")
                    for kind, text in zip(kinds, raw, strict=True)
                ]
                gone = pc.or_(gone, pa.array(named, pa.bool_()))
            if self.hashes:
                for name, column in (("user_id", users), ("anonymous_id", names)):
                    batch = batch.set_column(batch.schema.get_field_index(name), name, column)
            left = batch.filter(pc.invert(gone))
            skipped += batch.num_rows - left.num_rows
            yield left
        return skipped

    def names_forgotten(self, text: str) -> bool:
        """Whether a text that is no record has the id of a forgotten person: as a word, or as up to
        `WORDS` words in a row with what is between them."""
        return any(self._named(one) for one in writings(text))

    def _named(self, text: str) -> bool:
        spans = [found.span() for found in WORD.finditer(text)]
        for at, (begin, _) in enumerate(spans):
            for _, end in spans[at : at + WORDS]:
                word = text[begin:end]
                for one in {word, word.rstrip(".!?")}:
                    if {self.pseudonym(one), self.of_anonymous(one)} & self.forgotten:
                        return True
        return False


def keyed(context: Context, hashes: bool, forgotten: frozenset[str] = frozenset()) -> Privacy:
    """Raises: SettingsError: there is no key, or another than this source's tables know."""
    name = context.source.name
    secret = settings().id_key
    if secret is None or len(secret.get_secret_value()) < 32:
        short = "is too short" if secret else "is not set"
        raise SettingsError(
            f"SESSIONMILL_ID_KEY {short}, and users of {name} who are hashed or erased are known by it: {HOW}"
        )
    made = Privacy(secret.get_secret_value().encode(), name, hashes, forgotten)
    known = set(context.lake.small(FORGOTTEN)["key_check"].to_pylist())
    if known - {made.key_check}:
        raise SettingsError(
            f"SESSIONMILL_ID_KEY is not the key by which people of {name} were hashed or forgotten "
            "before: with another one they would come back. Set the old key"
        )
    return made


def privacy_of(context: Context) -> Privacy | None:
    """What ingestion obeys for this source; None: nothing.

    Raises:
        SettingsError: it needs a key, and the right one is not there.
    """
    lake, hashes = context.lake, context.source.privacy.hash_user_id
    rows = lake.small(FORGOTTEN).to_pylist()
    if not rows and not hashes:
        return None
    gone = frozenset(row["user_hash"] for row in rows if row["user_hash"])
    made = keyed(context, hashes, gone)
    if hashes and not rows:
        lake.create(FORGOTTEN)  # the key's check, before anything is hashed by it
        lake.put_small(FORGOTTEN, [("", made.key_check, context.started)])
    return made
