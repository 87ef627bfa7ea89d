/* Prints one request or reply of each kind as the system's linux/fuse.h lays it out: "request NAME hex" or "reply ...".
 *
 * tests/unit/golden/fuse.txt is its output.  What is newer than the header (protocol 7.38 in Debian 12) is declared
 * below, from the kernel's own header of 7.45.
 */
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>

#if FUSE_KERNEL_MINOR_VERSION < 39
#define FUSE_STATX 52
struct fuse_sx_time {
	int64_t tv_sec;
	uint32_t tv_nsec;
	int32_t reserved;
};
struct fuse_statx {
	uint32_t mask, blksize;
	uint64_t attributes;
	uint32_t nlink, uid, gid;
	uint16_t mode, spare0[1];
	uint64_t ino, size, blocks, attributes_mask;
	struct fuse_sx_time atime, btime, ctime, mtime;
	uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
	uint64_t spare2[14];
};
struct fuse_statx_in {
	uint32_t getattr_flags, reserved;
	uint64_t fh;
	uint32_t sx_flags, sx_mask;
};
struct fuse_statx_out {
	uint64_t attr_valid;
	uint32_t attr_valid_nsec, flags;
	uint64_t spare[2];
	struct fuse_statx stat;
};
#endif
#if FUSE_KERNEL_MINOR_VERSION < 45
#define FUSE_COPY_FILE_RANGE_64 53
struct fuse_copy_file_range_out {
	uint64_t bytes_copied;
};
#endif
#if FUSE_KERNEL_MINOR_VERSION < 44
#define FUSE_NOTIFY_INC_EPOCH 8
#endif
#define UNIQUE 0x1122334455667788ull

static unsigned char body[4096];
static size_t used;

static void add(const void *bytes, size_t size)
{
	memcpy(body + used, bytes, size);
	used += size;
}

static void hex(const void *bytes, size_t size)
{
	for (size_t i = 0; i < size; i++)
		printf("%02x", ((const unsigned char *)bytes)[i]);
}

static void request(const char *name, int opcode, int extensions)
{
	struct fuse_in_header header = { .len = sizeof header + used, .opcode = opcode, .unique = UNIQUE, .nodeid = 9,
		.uid = 1000, .gid = 100, .pid = 77, .total_extlen = extensions };
	printf("request %s ", name);
	hex(&header, sizeof header);
	hex(body, used);
	printf("\n");
	used = 0;
}

static void reply(const char *name, int error, int notification)
{
	struct fuse_out_header header = { .len = sizeof header + used, .error = error, .unique = notification ? 0 : UNIQUE };
	printf("reply %s ", name);
	hex(&header, sizeof header);
	hex(body, used);
	printf("\n");
	used = 0;
}

#define NAMED(text) add(text, sizeof text)
#define WITH(type, ...) do { struct type in = { __VA_ARGS__ }; add(&in, sizeof in); } while (0)
#define REQUEST(name) request(#name, FUSE_##name, 0)

static void requests(void)
{
	NAMED("name"); REQUEST(LOOKUP);
	WITH(fuse_forget_in, .nlookup = 3); REQUEST(FORGET);
	WITH(fuse_getattr_in, .getattr_flags = 1, .fh = 5); REQUEST(GETATTR);
	WITH(fuse_setattr_in, .valid = 0xc7f, .fh = 5, .size = 70, .lock_owner = 6, .atime = 1, .mtime = -2ll, .ctime = 3,
	     .atimensec = 4, .mtimensec = 5, .ctimensec = 6, .mode = 0104755, .uid = 7, .gid = 8); REQUEST(SETATTR);
	REQUEST(READLINK);
	NAMED("name"); NAMED("target"); REQUEST(SYMLINK);
	WITH(fuse_mknod_in, .mode = 010644, .rdev = 5, .umask = 022); NAMED("name"); REQUEST(MKNOD);
	WITH(fuse_mkdir_in, .mode = 0755, .umask = 022); NAMED("name"); REQUEST(MKDIR);
	/* With the caller's groups as an extension: FUSE_EXT_GROUPS, struct fuse_supp_groups. */
	WITH(fuse_mkdir_in, .mode = 0755, .umask = 022); NAMED("name");
	WITH(fuse_ext_header, .size = 16, .type = 32); add((uint32_t[]){ 1, 8 }, 8);
	request("MKDIR+GROUPS", FUSE_MKDIR, 2);
	NAMED("name"); REQUEST(UNLINK);
	NAMED("name"); REQUEST(RMDIR);
	WITH(fuse_rename_in, .newdir = 8); NAMED("name"); NAMED("new"); REQUEST(RENAME);
	WITH(fuse_link_in, .oldnodeid = 8); NAMED("name"); REQUEST(LINK);
	WITH(fuse_open_in, .flags = 01002, .open_flags = 1); REQUEST(OPEN);
	WITH(fuse_read_in, .fh = 5, .offset = 1ull << 40, .size = 4096, .read_flags = 2, .lock_owner = 6, .flags = 0100000);
	REQUEST(READ);
	WITH(fuse_write_in, .fh = 5, .offset = 1ull << 40, .size = 5, .write_flags = 5, .lock_owner = 6, .flags = 2);
	NAMED("text"); REQUEST(WRITE);
	REQUEST(STATFS);
	WITH(fuse_release_in, .fh = 5, .flags = 2, .release_flags = 2, .lock_owner = 6); REQUEST(RELEASE);
	WITH(fuse_fsync_in, .fh = 5, .fsync_flags = 1); REQUEST(FSYNC);
	WITH(fuse_setxattr_in, .size = 6, .flags = 1); NAMED("user.a"); NAMED("value"); REQUEST(SETXATTR);
	add((uint32_t[]){ 6, 2 }, FUSE_COMPAT_SETXATTR_IN_SIZE); NAMED("user.a"); NAMED("value");
	request("SETXATTR_SHORT", FUSE_SETXATTR, 0);
	WITH(fuse_getxattr_in, .size = 64); NAMED("user.a"); REQUEST(GETXATTR);
	WITH(fuse_getxattr_in, .size = 64); REQUEST(LISTXATTR);
	NAMED("user.a"); REQUEST(REMOVEXATTR);
	WITH(fuse_flush_in, .fh = 5, .lock_owner = 6); REQUEST(FLUSH);
	WITH(fuse_init_in, .major = 7, .minor = 45, .max_readahead = 131072, .flags = 0x73fffffb, .flags2 = 0x17f); REQUEST(INIT);
	WITH(fuse_open_in, .flags = 0200000); REQUEST(OPENDIR);
	WITH(fuse_read_in, .fh = 5, .offset = 1ull << 40, .size = 4096); REQUEST(READDIR);
	WITH(fuse_release_in, .fh = 5, .flags = 0200000); REQUEST(RELEASEDIR);
	WITH(fuse_fsync_in, .fh = 5); REQUEST(FSYNCDIR);
	WITH(fuse_lk_in, .fh = 5, .owner = 6, .lk = { .start = 10, .end = ~0ull >> 1, .type = 1, .pid = 77 }); REQUEST(GETLK);
	WITH(fuse_lk_in, .fh = 5, .owner = 6, .lk = { .start = 10, .end = 20, .type = 0, .pid = 77 }); REQUEST(SETLK);
	WITH(fuse_lk_in, .fh = 5, .owner = 6, .lk = { .start = 0, .end = ~0ull >> 1, .type = 1, .pid = 77 }, .lk_flags = 1);
	REQUEST(SETLKW);
	WITH(fuse_access_in, .mask = 4); REQUEST(ACCESS);
	WITH(fuse_create_in, .flags = 2, .mode = 0100644, .umask = 022); NAMED("name"); REQUEST(CREATE);
	WITH(fuse_interrupt_in, .unique = 12); REQUEST(INTERRUPT);
	WITH(fuse_bmap_in, .block = 1, .blocksize = 4096); REQUEST(BMAP);
	REQUEST(DESTROY);
	WITH(fuse_ioctl_in, .fh = 5, .flags = 0, .cmd = 0x80086601, .arg = 0, .in_size = 0, .out_size = 8); REQUEST(IOCTL);
	WITH(fuse_poll_in, .fh = 5, .kh = 1, .flags = 0, .events = 1); REQUEST(POLL);
	WITH(fuse_batch_forget_in, .count = 2); WITH(fuse_forget_one, 5, 1); WITH(fuse_forget_one, 6, 2); REQUEST(BATCH_FORGET);
	WITH(fuse_fallocate_in, .fh = 5, .offset = 4096, .length = 100, .mode = 3); REQUEST(FALLOCATE);
	WITH(fuse_read_in, .fh = 5, .offset = 1ull << 40, .size = 4096); REQUEST(READDIRPLUS);
	WITH(fuse_rename2_in, .newdir = 8, .flags = 2); NAMED("name"); NAMED("new"); REQUEST(RENAME2);
	WITH(fuse_lseek_in, .fh = 5, .offset = 4096, .whence = 3); REQUEST(LSEEK);
	WITH(fuse_copy_file_range_in, .fh_in = 5, .off_in = 4096, .nodeid_out = 8, .fh_out = 6, .off_out = 8192, .len = 100);
	REQUEST(COPY_FILE_RANGE);
	WITH(fuse_syncfs_in, 0); REQUEST(SYNCFS);
	WITH(fuse_create_in, .flags = 2, .mode = 0100600, .umask = 022); NAMED("/"); REQUEST(TMPFILE);
	WITH(fuse_statx_in, .fh = 5, .sx_mask = 0xfff); REQUEST(STATX);
	WITH(fuse_copy_file_range_in, .fh_in = 5, .off_in = 4096, .nodeid_out = 8, .fh_out = 6, .off_out = 8192, .len = 100);
	REQUEST(COPY_FILE_RANGE_64);
}

#define ATTR { .ino = 10, .size = 12345, .blocks = 25, .atime = -2ll, .mtime = 2, .ctime = 3, .atimensec = 500000000, \
	.mtimensec = 1, .ctimensec = 2, .mode = 0100640, .nlink = 3, .uid = 1, .gid = 2, .rdev = 0x12345, .blksize = 65536 }
#define ENTRY { .nodeid = 10, .entry_valid = 3600, .attr_valid = 1, .attr_valid_nsec = 500000000, .attr = ATTR }
#define REPLY(name) reply(name, 0, 0)

static void replies(void)
{
	struct fuse_entry_out entry = ENTRY;
	struct fuse_dirent dirent = { .ino = 10, .off = 77, .namelen = 5, .type = 8 };

	reply("error", -2, 0);
	REPLY("done");
	NAMED("bytes"); REPLY("data");
	add(&entry, sizeof entry); REPLY("entry");
	WITH(fuse_attr_out, .attr_valid = 1, .attr_valid_nsec = 500000000, .attr = ATTR); REPLY("attributes");
	WITH(fuse_statx_out, .attr_valid = 1, .attr_valid_nsec = 500000000, .stat = { .mask = 0xfff, .blksize = 65536,
	     .nlink = 3, .uid = 1, .gid = 2, .mode = 0100640, .ino = 10, .size = 12345, .blocks = 25,
	     .atime = { -2, 500000000 }, .btime = { 9, 8 }, .ctime = { 3, 2 }, .mtime = { 2, 1 },
	     .rdev_major = 0x123, .rdev_minor = 0x45 }); REPLY("statx");
	WITH(fuse_open_out, .fh = 5, .open_flags = FOPEN_KEEP_CACHE); REPLY("opened_file");
	WITH(fuse_open_out, .fh = 5, .open_flags = FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES); REPLY("opened_direct");
	WITH(fuse_open_out, .fh = 5, .open_flags = FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR); REPLY("opened_directory");
	add(&entry, sizeof entry); WITH(fuse_open_out, .fh = 5); REPLY("created");
	WITH(fuse_write_out, .size = 4096); REPLY("written");
	WITH(fuse_lseek_out, .offset = 1ull << 40); REPLY("number");
	WITH(fuse_copy_file_range_out, .bytes_copied = 1ull << 40); REPLY("copied");
	WITH(fuse_statfs_out, .st = { .blocks = 100, .bfree = 60, .bavail = 60, .files = 7, .ffree = 5, .bsize = 4096,
	     .namelen = 255, .frsize = 4096 }); REPLY("statfs");
	WITH(fuse_lk_out, .lk = { .start = 10, .end = 20, .type = 1, .pid = 77 }); REPLY("lock");
	WITH(fuse_ioctl_out, .result = 0); add((uint32_t[]){ 16 }, 4); REPLY("ioctl");
	WITH(fuse_init_out, .major = 7, .minor = 38, .max_readahead = 131072, .flags = 0x7000000f, .max_background = 64,
	     .congestion_threshold = 48, .max_write = 1048576, .time_gran = 1, .max_pages = 256, .flags2 = 0x14); REPLY("init");
	add(&dirent, sizeof dirent); add("names\0\0", 8); REPLY("listing");
	add(&entry, sizeof entry); add(&dirent, sizeof dirent); add("names\0\0", 8); REPLY("listing_plus");
	WITH(fuse_notify_inval_inode_out, .ino = 10, .off = -1); reply("forget_attributes", FUSE_NOTIFY_INVAL_INODE, 1);
	WITH(fuse_notify_inval_inode_out, .ino = 10, .off = 4096, .len = 100); reply("forget_pages", FUSE_NOTIFY_INVAL_INODE, 1);
	WITH(fuse_notify_inval_entry_out, .parent = 9, .namelen = 4); NAMED("name"); reply("forget_entry", FUSE_NOTIFY_INVAL_ENTRY, 1);
	WITH(fuse_notify_delete_out, .parent = 9, .child = 10, .namelen = 4); NAMED("name"); reply("entry_deleted", FUSE_NOTIFY_DELETE, 1);
	WITH(fuse_notify_inval_entry_out, .parent = 9, .namelen = 4, .flags = FUSE_EXPIRE_ONLY); NAMED("name"); reply("doubt_entry", FUSE_NOTIFY_INVAL_ENTRY, 1);
	reply("forget_all_names", FUSE_NOTIFY_INC_EPOCH, 1);
}

int main(void)
{
	requests();
	replies();
	return 0;
}
