"""Inodes that sessions have open, and those they keep although they have no name any more.

An inode without a name exists exactly as long as a session holds it: the durable keys "h" (by session) and "i" ... "O"
(by inode) say which, so that a restart of the service loses none (M6).  Who has an inode *with* names open is memory:
metadata/core/opens.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from metadata.core import schema
from metadata.core.namespace.inodes import destroy
from metadata.core.opens import UNTOLD, Opens
from metadata.engine.ports import WriteTxn

HOLDERS_MAX = 1 << 20
"""Sessions that hold one inode: no bound of its own, as there are fewer sessions."""


def hold(txn: WriteTxn, ino: int, *, session: int, now_ns: int) -> None:
    """Keep an inode without a name for `session`; nothing if it is kept for it already."""
    key = schema.held_key(session, ino)
    if txn.get(key) is None:
        txn.put(key, schema.encode_time(now_ns))
        txn.put(schema.holder_key(ino, session), schema.encode_time(now_ns))


def let_go(txn: WriteTxn, ino: int, *, session: int, now_ns: int) -> None:
    """`session` does not hold the inode any more; it ends with its last holder.  Nothing if it was not held."""
    if txn.delete(schema.held_key(session, ino)):
        txn.delete(schema.holder_key(ino, session))
        if not txn.scan(*schema.holder_range(ino), 1):
            destroy(txn, ino, now_ns=now_ns)


def name_again(txn: WriteTxn, ino: int, *, opens: Opens) -> None:
    """The inode gets a name: nobody holds it any more, and those who did have it open.

    Raises: ServerOverloaded (a session has too much open).
    """
    for key, _ in txn.scan(*schema.holder_range(ino), HOLDERS_MAX):
        _, session = schema.decode_holder_key(key)
        if session != UNTOLD:  # They may have everything open that has a name.
            opens.add(session, ino)
        txn.delete(schema.held_key(session, ino))
        txn.delete(key)


def register_open(txn: WriteTxn, ino: int, *, session: int, opens: Opens, now_ns: int) -> None:
    """`session` has opened the inode; if it has no name (a descriptor opened anew through /proc), it is held."""
    raw = txn.get(schema.inode_key(ino))
    if raw is None:
        return
    opens.add(session, ino)
    inode = schema.decode_inode(raw)
    if inode.nlink == 0:
        hold(txn, ino, session=session, now_ns=now_ns)


def register_all(
    txn: WriteTxn, *, session: int, inos: Iterable[int], complete: bool, opens: Opens, now_ns: int
) -> None:
    """`session` has these open, or holds them; once that is `complete`, it has nothing else.

    Raises: ServerOverloaded.
    """
    for ino in inos:
        register_open(txn, ino, session=session, opens=opens, now_ns=now_ns)
    if complete:
        opens.reclaimed(session)


def release_inodes(txn: WriteTxn, *, session: int, inos: Iterable[int], opens: Opens, now_ns: int) -> None:
    """`session` has closed these; those it holds without a name end, unless another has them open."""
    for ino in inos:
        opens.remove(session, ino)
        let_go(txn, ino, session=session, now_ns=now_ns)
