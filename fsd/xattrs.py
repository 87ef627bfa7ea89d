"""Extended attributes.

The kernel asks for security.capability at every write, and programs that copy ask for several names of every file:
so what is there, and above all what is *not* there, is remembered.  An inode that was made through this mount is known
to have none, unless it inherited an access control list.  While sharing, what was learnt holds until the service
recalls the inode's attributes.
Those of the name space "fsd." (usage and quotas of directories) change with what is below; they are always asked for.
"""

from __future__ import annotations

import stat

from fsd.frontend.ports import Answer
from fsd.mount_state import MountState
from fsd.nodes import Node
from metadata.core.namespace import quotas
from metadata.core.namespace.data import CAPABILITY_XATTR
from metadata.core.posix_acl import ACCESS_XATTR, DEFAULT_XATTR, XATTR_NAMES
from metadata.core.schema import InodeFlags
from metadata.protocol import Caller, GetXattr, ListXattr, RemoveXattr, SetXattr, SetXattrMode
from wire.errors import NoSuchAttribute, NoSuchEntry, NotSupported, StaleInode

NAMESPACES = (b"user.", b"security.", b"trusted.")
"""What there is, apart from access control lists."""
FLAGS = {
    CAPABILITY_XATTR: InodeFlags.CAPABILITY,
    ACCESS_XATTR: InodeFlags.ACCESS_ACL,
    DEFAULT_XATTR: InodeFlags.DEFAULT_ACL,
}
"""Attributes of which the inode tells whether it has them."""
REMEMBERED_MAX = 32
"""Names remembered for one inode."""
REMEMBERED_SIZE_MAX = 1024
"""Values longer than this are not remembered."""


class Xattrs:
    """Extended attributes of inodes."""

    def __init__(self, state: MountState) -> None:
        self._state = state
        self._nodes = state.nodes

    def getxattr(self, nodeid: int, name: bytes, caller: Caller) -> Answer[bytes]:
        """See ports.Operations."""
        if name.startswith(quotas.PREFIX):
            return self._ask(self._nodes.ino_of(nodeid), name, caller)
        if not name.startswith(NAMESPACES) and name not in XATTR_NAMES:
            raise NotSupported(f"extended attribute {name!r}")
        node = self._nodes.obtain(self._nodes.ino_of(nodeid))
        if name in FLAGS and self._lacks(node, name):
            raise NoSuchAttribute(f"inode {node.ino} has no {name!r}")
        if name in XATTR_NAMES:  # Not remembered: chmod changes the list, and the kernel keeps it.
            return self._ask(node.ino, name, caller)
        if self._is_remembered(node):
            value = node.xattrs.get(name)
            if value is not None and not name.startswith(b"trusted."):  # Those are not for everybody.
                return value
            if value is None and (node.xattrs_complete or name in node.xattrs) and name not in NAMESPACES:
                raise NoSuchAttribute(f"inode {node.ino} has no {name!r}")
        return self._getxattr(node, name, caller)

    def _lacks(self, node: Node, name: bytes) -> bool:
        """Whether the inode's flags say that it has no attribute of that name, which is one of FLAGS."""
        if node.inode is None or stat.S_ISLNK(node.inode.mode):
            return False
        if not self._nodes.is_fresh(node):
            return False
        return not self._nodes.attributes(node).flags & FLAGS[name]

    def _is_remembered(self, node: Node) -> bool:
        return node.xattrs_at >= self._nodes.believed_since

    async def _ask(self, ino: int, name: bytes, caller: Caller) -> bytes:
        try:
            return (await self._state.ask(lambda session: GetXattr(session, ino, name, caller))).value
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error

    async def _getxattr(self, node: Node, name: bytes, caller: Caller) -> bytes:
        asked = self._nodes.now
        try:
            value = await self._ask(node.ino, name, caller)
        except NoSuchAttribute:
            self._remember(node, name, None, asked)
            raise
        self._remember(node, name, value, asked)
        return value

    def _remember(self, node: Node, name: bytes, value: bytes | None, asked: int) -> None:
        if asked < max(node.changed_at, self._nodes.believed_since):
            return
        if not self._is_remembered(node):
            node.xattrs = {}
            node.xattrs_complete = False
            node.xattrs_at = asked
        if asked < node.xattrs_at:  # The question crossed a change.
            return
        if len(node.xattrs) >= REMEMBERED_MAX:
            node.xattrs = {}
            node.xattrs_complete = False
        if value is not None and len(value) > REMEMBERED_SIZE_MAX:
            node.xattrs.pop(name, None)
            node.xattrs_complete = False
        else:
            node.xattrs[name] = value

    def _forget(self, node: Node) -> None:
        """A change is under way or was made: answers to older questions are not to be remembered."""
        self._nodes.now += 1
        node.xattrs = {}
        node.xattrs_complete = False
        node.xattrs_at = self._nodes.now

    def listxattr(self, nodeid: int, caller: Caller) -> Answer[tuple[bytes, ...]]:
        """See ports.Operations."""
        node = self._nodes.obtain(self._nodes.ino_of(nodeid))
        if node.xattrs_complete and self._is_remembered(node) and not any(node.xattrs.values()):
            return ()
        return self._listxattr(node, caller)

    async def _listxattr(self, node: Node, caller: Caller) -> tuple[bytes, ...]:
        ino = node.ino
        try:
            return (await self._state.ask(lambda session: ListXattr(session, ino, caller))).names
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error

    def setxattr(
        self, nodeid: int, name: bytes, value: bytes, how: int, caller: Caller, *, drop_sgid: bool = False
    ) -> Answer[None]:
        """See ports.Operations."""
        node = self._nodes.obtain(self._nodes.ino_of(nodeid))
        return self._setxattr(node, name, value, how, caller, drop_sgid=drop_sgid)

    async def _setxattr(
        self, node: Node, name: bytes, value: bytes, how: int, caller: Caller, *, drop_sgid: bool
    ) -> None:
        """After an access list the kernel asks for the attributes by itself: the mode is another one."""
        asked, ino = self._nodes.now, node.ino
        try:
            reply = await self._state.mutate(
                lambda session, sequence: SetXattr(
                    session,
                    sequence,
                    ino=ino,
                    name=name,
                    value=value,
                    how=SetXattrMode(how),
                    caller=caller,
                    drop_sgid=drop_sgid,
                ),
                inos=(ino,),
                entries=(),
            )
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        finally:
            self._forget(node)
        self._nodes.learn(ino, reply.inode, asked)

    def removexattr(self, nodeid: int, name: bytes, caller: Caller) -> Answer[None]:
        """See ports.Operations."""
        return self._removexattr(self._nodes.obtain(self._nodes.ino_of(nodeid)), name, caller)

    async def _removexattr(self, node: Node, name: bytes, caller: Caller) -> None:
        asked, ino = self._nodes.now, node.ino
        try:
            reply = await self._state.mutate(
                lambda session, sequence: RemoveXattr(session, sequence, ino=ino, name=name, caller=caller),
                inos=(ino,),
                entries=(),
            )
        except NoSuchEntry as error:
            raise StaleInode(error.detail) from error
        finally:
            self._forget(node)
        self._nodes.learn(ino, reply.inode, asked)
