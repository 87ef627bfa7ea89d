"""Each mutation takes effect once, however often its request arrives.

A session numbers its mutations.  Whatever the first copy of a number was answered, success or refusal, is kept in the
same transaction as its effect, in a ring of SEQUENCE_WINDOW places per session, so that it is as durable as the effect.
A number whose place has gone to a newer one is answered TooOldRequest: its sender has long had its answer, as the
numbers in flight span less than the ring.

Faults (NoSpace, a bug) and answers that ask for another try later are not kept: nothing was done, and the same number
may try again.
"""

from __future__ import annotations

from typing import Protocol

from metadata.core import schema
from metadata.core.dispatch import apply, remember_open
from metadata.core.opens import Opens
from metadata.core.schema import AnswerRecord
from metadata.engine.ports import EngineBroken, EngineFault, ReadTxn, RunAgain, WriteTxn
from metadata.protocol import SEQUENCE_WINDOW, LayoutReply, Mutation
from wire.errors import DETAIL_SIZE_MAX, NoSpace, Retry, StoreError, TooOldRequest, from_code
from wire.message import Message

ENGINE_ERRORS = (RunAgain, NoSpace, EngineFault, EngineBroken)
"""What a transaction's methods raise: after one of these it has been aborted."""

KEPT_ANSWER_SIZE_MAX = 32 << 10
"""Bytes of one kept answer; with its envelope below schema.VALUE_SIZE_MAX."""


class NewestAnswered(Protocol):
    """The highest sequence number answered, by session: spares most requests a look at the ring.

    What is set must be forgotten when the transaction is aborted.
    """

    def get(self, session: int) -> int | None:
        """None: not known yet."""
        ...

    def set(self, session: int, sequence: int) -> None:
        """From now on it is `sequence`."""
        ...


def apply_once(
    txn: WriteTxn,
    request: Mutation[Message],
    *,
    newest: NewestAnswered,
    now_ns: int,
    opens: Opens | None = None,
) -> bytes | StoreError:
    """Carry the request out, or find what it was answered before.

    Args:
        opens: as for dispatch.apply.

    Returns:
        The encoded reply; or a refusal (TooOldRequest among them), which has left no trace but the kept answer.

    Raises:
        ENGINE_ERRORS: the transaction has ended.
        Whatever else a bug raises: the transaction is as before the call.
    """
    session, sequence = request.session, request.sequence
    highest = newest.get(session)
    if highest is None:
        highest = highest_kept(txn, session)
    key = schema.answer_key(session, sequence % SEQUENCE_WINDOW)
    if sequence <= highest:
        kept = _kept(txn, key, request)
        if kept is not None:
            if opens is not None and isinstance(kept, bytes):
                remember_open(request, kept, opens)
            return kept
    savepoint = txn.savepoint()
    try:
        reply = apply(txn, request, now_ns=now_ns, opens=opens)
        body = schema.encode_record(reply)
        answer: bytes | StoreError = body
        record = AnswerRecord(sequence, 0, _kept_body(reply, body))
    except ENGINE_ERRORS:
        raise  # The transaction is gone.
    except StoreError as error:
        txn.rollback_to(savepoint)
        if error.retry is Retry.LATER:
            return error
        answer, record = error, AnswerRecord(sequence, error.code, error.detail[:DETAIL_SIZE_MAX].encode())
    except BaseException:
        txn.rollback_to(savepoint)
        raise
    else:
        txn.release(savepoint)
    txn.put(key, schema.encode_record(record))
    newest.set(session, max(highest, sequence))
    return answer


def highest_kept(txn: ReadTxn, session: int) -> int:
    """The highest number in the session's ring; 0 if it has none."""
    start, end = schema.answer_range(session)
    return max((schema.decode_answer(raw).sequence for _, raw in txn.scan(start, end, SEQUENCE_WINDOW)), default=0)


def _kept(txn: ReadTxn, key: bytes, request: Mutation[Message]) -> bytes | StoreError | None:
    """The kept answer of this very number, TooOldRequest if its place was taken since, None if it is new."""
    raw = txn.get(key)
    if raw is None:
        return None
    kept = schema.decode_answer(raw)
    if kept.sequence > request.sequence:
        return TooOldRequest(f"request {request.sequence} of session {request.session}")
    if kept.sequence < request.sequence:
        return None
    return from_code(kept.code, kept.body.decode()) if kept.code else kept.body


def _kept_body(reply: Message, body: bytes) -> bytes:
    """What to keep of a reply: all of it, if it is not too long."""
    if len(body) <= KEPT_ANSWER_SIZE_MAX:
        return body
    # Only an open of a file that was there already is that long: the client asks for the extents again.
    assert isinstance(reply, LayoutReply)
    return schema.encode_record(LayoutReply(reply.ino, reply.inode, reply.inline, (), 0))
