"""Listings: opendir, readdir with cookies, releasedir.

A handle keeps one page of the listing.  A page is good for *names* until this mount changes an entry of the directory
(then the rest is asked for again, from the cookie where the kernel is); the *attributes* told are always the node's
newest, and those of an inode without a node only while nothing was lost since the page was asked for.

Cookies: 0 is the beginning, DOT_COOKIE comes after ".", DOTDOT_COOKIE after "..", and the service's begin at
FIRST_COOKIE.  A cookie may belong to several entries (names of equal hash): `DirectoryHandle.cut_count` knows how many
of the equal ones the kernel has got when a reply ended amid them.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left, bisect_right
from operator import attrgetter

from fsd.frontend.ports import AddEntry, Answer, Entry, Opened
from fsd.handles import PAGE_SIZE_MAX, DirectoryHandle, Page
from fsd.mount_state import MountState
from fsd.nodes import Node
from metadata.protocol import FIRST_COOKIE, Dirent, ReadDir
from wire.errors import NoSuchEntry, NotDirectory, StaleInode, StoreError

_COOKIE = attrgetter("cookie")
DOT_COOKIE = 1
DOTDOT_COOKIE = 2
assert DOTDOT_COOKIE < FIRST_COOKIE


class Directories:
    """Handles of open directories."""

    def __init__(self, state: MountState) -> None:
        self._state = state
        self._nodes = state.nodes
        self._handles = state.handles.directories

    def opendir(self, nodeid: int, flags: int = os.O_RDONLY) -> Answer[Opened]:
        """See ports.Operations."""
        nodes = self._nodes
        node = nodes.obtain(nodes.ino_of(nodeid))
        if nodes.is_fresh(node) or node.gone:
            return self._opened(node, flags)
        return self._opendir(node, flags)

    async def _opendir(self, node: Node, flags: int) -> Opened:
        await self._state.fetch(node)
        return self._opened(node, flags)

    def _opened(self, node: Node, flags: int) -> Opened:
        if not stat.S_ISDIR(self._nodes.attributes(node).mode):
            raise NotDirectory("opendir")
        if self._state.access_times.is_due_at_open(node, flags):
            self._state.access_times.count_open(node)
        fh = self._state.handles.next()
        self._handles[fh] = DirectoryHandle(fh, node, counts_reads=self._state.access_times.counts(flags))
        keep_cache = self._nodes.is_fresh(node) and not node.listing_is_doubtful
        node.listing_is_doubtful = False  # Otherwise the kernel drops it with this answer.
        return Opened(fh, keep_cache=keep_cache)

    def releasedir(self, fh: int) -> None:
        """See ports.Operations."""
        self._handles.pop(fh, None)

    def fsyncdir(self, fh: int) -> None:
        """See ports.Operations."""

    # --- reading ---

    def readdir(self, fh: int, cookie: int, plus: bool, add: AddEntry) -> Answer[None]:
        """See ports.Operations."""
        handle = self._state.handles.directory(fh)
        if cookie < DOTDOT_COOKIE:
            handle.node.may_have_pages = True
            if handle.counts_reads:
                self._state.access_times.maybe_count(handle.node)
            if not self._add_dots(handle, cookie, add):
                return None
            handle.page = None  # From the beginning: what is in hand may be old.
        after = cookie if cookie >= FIRST_COOKIE else 0
        page = handle.page
        if page is None or handle.node.entries_changed_at > page.asked:
            return self._fetch_and_add(handle, after, plus, add)
        index = self._index_after(handle, page, after)
        if index is None or (index == len(page.entries) and not page.end):
            return self._fetch_and_add(handle, after, plus, add)
        self._add_entries(handle, page, index, plus, add)
        return None

    def _add_dots(self, handle: DirectoryHandle, cookie: int, add: AddEntry) -> bool:
        nodes, node = self._nodes, handle.node
        inode = nodes.attributes(node)
        if cookie < DOT_COOKIE and not add(b".", Entry(nodes.nodeid_of(node.ino), inode, 0.0, 0.0), DOT_COOKIE):
            return False
        parent = node.ino if node.ino == nodes.root_ino else inode.parent
        return add(b"..", Entry(nodes.nodeid_of(parent), inode, 0.0, 0.0), DOTDOT_COOKIE)

    @staticmethod
    def _index_after(handle: DirectoryHandle, page: Page, after: int) -> int | None:
        """Where in the page the listing goes on after that cookie; None: not in this page."""
        entries = page.entries
        if after == handle.cut_cookie and after > page.after:
            return bisect_left(entries, after, key=_COOKIE) + handle.cut_count
        if after < page.after or (after > page.after and (not entries or after > entries[-1].cookie)):
            return None
        return bisect_right(entries, after, key=_COOKIE)

    async def _fetch_and_add(self, handle: DirectoryHandle, after: int, plus: bool, add: AddEntry) -> None:
        """Ask for the next page, and add what fits of it."""
        amid = after == handle.cut_cookie and after > 0
        page = await self._fetch(handle, after - 1 if amid else after)
        index = min(handle.cut_count, len(page.entries)) if amid else 0
        self._add_entries(handle, page, index, plus, add)

    async def _fetch(self, handle: DirectoryHandle, after: int) -> Page:
        nodes, node = self._nodes, handle.node
        ino, count = node.ino, handle.page_size
        while True:
            asked = nodes.now
            try:
                reply = await self._state.ask(
                    lambda session: ReadDir(session, ino, after=after, count=count, plus=True)
                )
            except NoSuchEntry as error:
                raise StaleInode(error.detail) from error
            if node.entries_changed_at <= asked:
                break
        page = Page(after, asked, reply.entries, reply.end)
        handle.page = page
        handle.page_size = min(count * 2, PAGE_SIZE_MAX)
        self._learn_page(handle, page)
        return page

    def _learn_page(self, handle: DirectoryHandle, page: Page) -> None:
        """Take note of names and attributes; once every page was seen without a gap, the names are complete."""
        nodes, node = self._nodes, handle.node
        asked = page.asked
        for entry in page.entries:
            if entry.inode is None:
                raise StoreError(f"the listing of {node.ino} came without attributes")
            nodes.learn(entry.ino, entry.inode, asked)
            nodes.learn_name(node, entry.name, entry.ino, asked)
        if page.after == 0:
            if node.names is None and nodes.learn_empty(node, asked):
                node.complete = False
            handle.listed_names = node.names
            handle.listed_until = 0
        is_gap = handle.listed_names is not node.names or page.after > handle.listed_until
        if handle.listed_names is None or is_gap or asked < max(nodes.believed_since, node.names_lost_at):
            handle.listed_names = None
            return
        if page.entries:
            handle.listed_until = max(handle.listed_until, page.entries[-1].cookie)
        if page.end:
            node.complete = True

    def _add_entries(self, handle: DirectoryHandle, page: Page, index: int, plus: bool, add: AddEntry) -> None:
        state, nodes = self._state, self._nodes
        entries = page.entries
        handle.cut_cookie = 0
        directory = handle.node
        if page.asked < max(directory.entries_doubted_at, nodes.believed_since):
            directory.listing_is_doubtful = True
        name_timeout_s = state.name_timeout_s(directory)
        for at in range(index, len(entries)):
            listed = entries[at]
            if not add(listed.name, self._entry_of(listed, directory, name_timeout_s), listed.cookie):
                if at > 0 and entries[at - 1].cookie == listed.cookie:
                    handle.cut_cookie = listed.cookie
                    handle.cut_count = at - bisect_left(entries, listed.cookie, key=_COOKIE)
                return
            if plus and listed.ino != state.nodes.root_ino:
                nodes.count_lookup(nodes.obtain(listed.ino))

    def _entry_of(self, listed: Dirent, directory: Node, name_timeout_s: float) -> Entry:
        """What to tell of a listed inode: the newest that is known; for how long, if it is sure."""
        nodes = self._nodes
        entry_timeout_s = name_timeout_s if nodes.is_told(directory, listed.name, listed.ino) else 0.0
        node = nodes.find(listed.ino)
        if node is None or node.inode is None:
            assert listed.inode is not None
            return Entry(nodes.nodeid_of(listed.ino), listed.inode, entry_timeout_s, 0.0)
        return Entry(nodes.nodeid_of(listed.ino), nodes.attributes(node), entry_timeout_s, self._state.timeout_s(node))
