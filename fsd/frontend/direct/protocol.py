"""The kernel's FUSE protocol, version 7: numbers, flags and the layout of every request and reply.

Source: Linux include/uapi/linux/fuse.h, protocol 7.45 (Linux 6.18).  All integers are in the machine's byte order, with
no gaps but those drawn as `-`.  `u64`, `u32`, `u16` are unsigned, `i64`, `i32` signed; `name` is bytes that end with a
NUL, `bytes` goes on to the end of the message.  Structs named in capitals are drawn once, below the tables.

A request read from /dev/fuse is one header and one body; a reply written to it likewise:

| header | layout | bytes |
|---|---|---|
| request | len:u32 opcode:u32 unique:u64 nodeid:u64 uid:u32 gid:u32 pid:u32 extensions:u16 -:u16 | 40 |
| reply | len:u32 error:i32 unique:u64 | 16 |
| notification | len:u32 code:i32 0:u64 | 16 |

`len` counts header and body.  `error` is 0 or a negated errno; a reply with an error has no body.  The last
`extensions` * 8 bytes of a request are extensions, each size:u32 type:u32 and padded to 8 bytes; type 32 is
count:u32 gid:u32[count], the caller's supplementary groups that matter.

| opcode | request | reply |
|---|---|---|
| 1 LOOKUP | name | ENTRY |
| 2 FORGET | count:u64 | no reply |
| 3 GETATTR | flags:u32 -:u32 fh:u64 | ATTRIBUTES |
| 4 SETATTR | valid:u32 -:u32 fh:u64 size:u64 lock_owner:u64 atime:i64 mtime:i64 ctime:i64 atime_ns:u32 mtime_ns:u32 \
ctime_ns:u32 mode:u32 -:u32 uid:u32 gid:u32 -:u32 | ATTRIBUTES |
| 5 READLINK | | bytes |
| 6 SYMLINK | name name (its target) | ENTRY |
| 8 MKNOD | mode:u32 rdev:u32 umask:u32 -:u32 name | ENTRY |
| 9 MKDIR | mode:u32 umask:u32 name | ENTRY |
| 10 UNLINK | name | |
| 11 RMDIR | name | |
| 12 RENAME | new_parent:u64 name name | |
| 13 LINK | old_nodeid:u64 name | ENTRY |
| 14 OPEN | flags:u32 open_flags:u32 | OPENED |
| 15 READ | fh:u64 offset:u64 size:u32 read_flags:u32 lock_owner:u64 flags:u32 -:u32 | bytes |
| 16 WRITE | fh:u64 offset:u64 size:u32 write_flags:u32 lock_owner:u64 flags:u32 -:u32 bytes | size:u32 -:u32 |
| 17 STATFS | | blocks:u64 bfree:u64 bavail:u64 files:u64 ffree:u64 bsize:u32 namelen:u32 frsize:u32 -:u32[7] |
| 18 RELEASE | fh:u64 flags:u32 release_flags:u32 lock_owner:u64 | |
| 20 FSYNC | fh:u64 fsync_flags:u32 -:u32 | |
| 21 SETXATTR | size:u32 flags:u32 setxattr_flags:u32 -:u32 name bytes | |
| 22 GETXATTR | size:u32 -:u32 name | size 0: size:u32 -:u32; else bytes |
| 23 LISTXATTR | size:u32 -:u32 | size 0: size:u32 -:u32; else name ... |
| 24 REMOVEXATTR | name | |
| 25 FLUSH | fh:u64 -:u32 -:u32 lock_owner:u64 | |
| 26 INIT | major:u32 minor:u32 max_readahead:u32 flags:u32 flags2:u32 -:u32[11] | major:u32 minor:u32 \
max_readahead:u32 flags:u32 max_background:u16 congestion_threshold:u16 max_write:u32 time_gran:u32 max_pages:u16 \
map_alignment:u16 flags2:u32 max_stack_depth:u32 request_timeout:u16 -:u16[11] |
| 27 OPENDIR | flags:u32 open_flags:u32 | OPENED |
| 28 READDIR | as READ | DIRENT ... |
| 29 RELEASEDIR | as RELEASE | |
| 30 FSYNCDIR | as FSYNC | |
| 31 GETLK | LOCK_REQUEST | LOCK |
| 32 SETLK, 33 SETLKW | LOCK_REQUEST | |
| 34 ACCESS | mask:u32 -:u32 | |
| 35 CREATE | flags:u32 mode:u32 umask:u32 open_flags:u32 name | ENTRY OPENED |
| 36 INTERRUPT | unique:u64 | no reply |
| 37 BMAP | block:u64 blocksize:u32 -:u32 | block:u64 |
| 38 DESTROY | | |
| 39 IOCTL | fh:u64 flags:u32 cmd:u32 arg:u64 in_size:u32 out_size:u32 bytes | result:i32 flags:u32 in_iovs:u32 \
out_iovs:u32 bytes |
| 40 POLL | fh:u64 kh:u64 flags:u32 events:u32 | revents:u32 -:u32 |
| 42 BATCH_FORGET | count:u32 -:u32 (nodeid:u64 count:u64)[count] | no reply |
| 43 FALLOCATE | fh:u64 offset:u64 length:u64 mode:u32 -:u32 | |
| 44 READDIRPLUS | as READ | (ENTRY DIRENT) ... |
| 45 RENAME2 | new_parent:u64 flags:u32 -:u32 name name | |
| 46 LSEEK | fh:u64 offset:u64 whence:u32 -:u32 | offset:u64 |
| 47 COPY_FILE_RANGE | fh_in:u64 offset_in:u64 nodeid_out:u64 fh_out:u64 offset_out:u64 length:u64 flags:u64 \
| size:u32 -:u32 |
| 50 SYNCFS | -:u64 | |
| 51 TMPFILE | as CREATE | ENTRY OPENED |
| 52 STATX | flags:u32 -:u32 fh:u64 sx_flags:u32 sx_mask:u32 | valid:u64 valid_ns:u32 flags:u32 -:u64[2] STATX |
| 53 COPY_FILE_RANGE_64 | as COPY_FILE_RANGE | size:u64 |

| notification | body |
|---|---|
| 2 INVAL_INODE | nodeid:u64 offset:i64 length:i64; offset -1: attributes only; length 0: to the end |
| 3 INVAL_ENTRY | parent:u64 namelen:u32 flags:u32 name |
| 6 DELETE | parent:u64 child:u64 namelen:u32 -:u32 name |
| 8 INC_EPOCH | |

| struct | layout | bytes |
|---|---|---|
| ATTR | ino:u64 size:u64 blocks:u64 atime:i64 mtime:i64 ctime:i64 atime_ns:u32 mtime_ns:u32 ctime_ns:u32 mode:u32 \
nlink:u32 uid:u32 gid:u32 rdev:u32 blksize:u32 flags:u32 | 88 |
| ENTRY | nodeid:u64 generation:u64 entry_valid:u64 attr_valid:u64 entry_valid_ns:u32 attr_valid_ns:u32 ATTR | 128 |
| ATTRIBUTES | attr_valid:u64 attr_valid_ns:u32 -:u32 ATTR | 104 |
| OPENED | fh:u64 open_flags:u32 backing_id:i32 | 16 |
| DIRENT | ino:u64 cookie:u64 namelen:u32 type:u32, the name without NUL, padded to 8 bytes | 24 and the name |
| LOCK | start:u64 end:u64 type:u32 pid:u32 | 24 |
| LOCK_REQUEST | fh:u64 owner:u64 LOCK lk_flags:u32 -:u32 | 48 |
| STATX | mask:u32 blksize:u32 attributes:u64 nlink:u32 uid:u32 gid:u32 mode:u16 -:u16 ino:u64 size:u64 blocks:u64 \
attributes_mask:u64 (seconds:i64 ns:u32 -:i32)[atime btime ctime mtime] rdev_major:u32 rdev_minor:u32 dev_major:u32 \
dev_minor:u32 -:u64[14] | 256 |
"""

from __future__ import annotations

import enum
from typing import Final

from metadata.protocol import FS_APPEND_FL, FS_IMMUTABLE_FL

MAJOR: Final = 7
MINOR: Final = 45
"""What is drawn above; the kernel's own minor version counts where it is lower."""
MINOR_MIN: Final = 31
"""Linux 5.4; structs of older kernels are shorter."""

WRITE_SIZE_MAX: Final = 1 << 20
"""Bytes in one WRITE (and, by MAX_PAGES, in one READ): more does not lower the cost of a byte any further."""
PAGES_MAX: Final = WRITE_SIZE_MAX // 4096
"""Pages of one request (MAX_PAGES); the kernel's bound for unprivileged mounts is 256 as well."""


class Opcode(enum.IntEnum):
    """What a request asks for."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Notification(enum.IntEnum):
    """What is told to the kernel without being asked."""

    INVAL_INODE = 2
    INVAL_ENTRY = 3
    DELETE = 6
    INC_EPOCH = 8


class InitFlags(enum.IntFlag):
    """What kernel and daemon agree on; bits from 32 on travel in `flags2`."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    SPLICE_WRITE = 1 << 7
    SPLICE_MOVE = 1 << 8
    SPLICE_READ = 1 << 9
    FLOCK_LOCKS = 1 << 10
    HAS_IOCTL_DIR = 1 << 11
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    MAP_ALIGNMENT = 1 << 26
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


# Plain integers, and not enumerations, where every request tests them: an IntFlag's `&` costs a microsecond.

FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8
FATTR_LOCKOWNER: Final = 1 << 9
FATTR_CTIME: Final = 1 << 10
FATTR_KILL_SUIDGID: Final = 1 << 11

EXPIRE_ONLY: Final = 1 << 0
"""Of INVAL_ENTRY: the name stays, and is asked for at its next use."""
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6

OPEN_KILL_SUIDGID: Final = 1 << 0
RELEASE_FLUSH: Final = 1 << 0
RELEASE_FLOCK_UNLOCK: Final = 1 << 1
WRITE_CACHE: Final = 1 << 0
WRITE_LOCKOWNER: Final = 1 << 1
WRITE_KILL_SUIDGID: Final = 1 << 2
FSYNC_FDATASYNC: Final = 1 << 0
LK_FLOCK: Final = 1 << 0
SETXATTR_ACL_KILL_SGID: Final = 1 << 0
IOCTL_DIR: Final = 1 << 4

FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_IOC_FSGETXATTR: Final = 0x801C581F
FS_IOC_FSSETXATTR: Final = 0x401C5820
"""The commands of IOCTL that the kernel makes of ioctl_iflags(2) and file_setattr(2), for programs of 32 bits too."""
EXTENDED_FLAGS: Final = {FS_IMMUTABLE_FL: 0x8, FS_APPEND_FL: 0x10}
"""FS_*_FL as FS_XFLAG_*, which struct fsxattr has."""

STATX_BASIC_STATS: Final = 0x7FF
STATX_BTIME: Final = 0x800

EXTENSION_GROUPS: Final = 32
"""FUSE_EXT_GROUPS: the caller's supplementary groups that matter for what is being made."""
