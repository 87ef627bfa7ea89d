/* A trivial file system in memory on libfuse's low-level interface: what scripts/bench_fuse compares fsd's front ends with.
 *
 * One directory; files by name in a hash table under one lock; every file reads as the same buffer.  Nothing may be
 * cached by the kernel.  Usage: bench_fuse_libfuse [-s] MOUNTPOINT (-s: one thread).
 */
#define FUSE_USE_VERSION 34
#include <errno.h>
#include <fuse_lowlevel.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define SIZE (64u << 20)
#define SLOTS 65536

struct file {
	struct file *next;
	char name[256];
	fuse_ino_t ino;
	off_t size;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct file *slots[SLOTS];
static struct file *by_ino[1 << 22];
static fuse_ino_t last = 1;
static char *content;

static struct file **slot_of(const char *name)
{
	unsigned hash = 5381;
	while (*name)
		hash = hash * 33 + (unsigned char)*name++;
	return &slots[hash % SLOTS];
}

static struct file **find(const char *name)
{
	struct file **at = slot_of(name);
	while (*at && strcmp((*at)->name, name))
		at = &(*at)->next;
	return at;
}

static void fill(struct stat *st, fuse_ino_t ino, off_t size)
{
	memset(st, 0, sizeof *st);
	st->st_ino = ino;
	st->st_mode = ino == 1 ? S_IFDIR | 0777 : S_IFREG | 0666;
	st->st_nlink = 1;
	st->st_size = size;
	st->st_blksize = 65536;
}

static void entry_of(struct fuse_entry_param *entry, struct file *file)
{
	memset(entry, 0, sizeof *entry);
	entry->ino = file->ino;
	fill(&entry->attr, file->ino, file->size);
}

static struct file *make(const char *name, off_t size)
{
	struct file **at = find(name), *file = *at;
	if (!file) {
		file = calloc(1, sizeof *file);
		strncpy(file->name, name, sizeof file->name - 1);
		file->ino = ++last;
		file->size = size;
		by_ino[file->ino] = file;
		*at = file;
	}
	return file;
}

static void do_lookup(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry;
	pthread_mutex_lock(&lock);
	struct file *file = *find(name);
	if (file)
		entry_of(&entry, file);
	pthread_mutex_unlock(&lock);
	if (file)
		fuse_reply_entry(req, &entry);
	else
		fuse_reply_err(req, ENOENT);
}

static void do_getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	struct stat st;
	fill(&st, ino, ino > 1 && by_ino[ino] ? by_ino[ino]->size : 0);
	fuse_reply_attr(req, &st, 0);
}

static void do_create(fuse_req_t req, fuse_ino_t parent, const char *name, mode_t mode, struct fuse_file_info *fi)
{
	struct fuse_entry_param entry;
	pthread_mutex_lock(&lock);
	entry_of(&entry, make(name, 0));
	pthread_mutex_unlock(&lock);
	fuse_reply_create(req, &entry, fi);
}

static void do_unlink(fuse_req_t req, fuse_ino_t parent, const char *name)
{
	pthread_mutex_lock(&lock);
	struct file **at = find(name), *file = *at;
	if (file)
		*at = file->next;
	pthread_mutex_unlock(&lock);
	fuse_reply_err(req, file ? 0 : ENOENT);
}

static void do_open(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	fuse_reply_open(req, fi);
}

static void do_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t offset, struct fuse_file_info *fi)
{
	if (offset >= SIZE)
		size = 0;
	else if (offset + size > SIZE)
		size = SIZE - offset;
	fuse_reply_buf(req, content + offset, size);
}

static void do_write(fuse_req_t req, fuse_ino_t ino, const char *data, size_t size, off_t offset, struct fuse_file_info *fi)
{
	fuse_reply_write(req, size);
}

static void do_done(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *fi)
{
	fuse_reply_err(req, 0);
}

static void do_init(void *data, struct fuse_conn_info *connection)
{
	connection->max_write = 1 << 20;
	connection->max_readahead = 1 << 20;
	connection->max_background = 64;
}

static const struct fuse_lowlevel_ops operations = {
	.init = do_init, .lookup = do_lookup, .getattr = do_getattr, .create = do_create, .unlink = do_unlink, .open = do_open,
	.read = do_read, .write = do_write, .flush = do_done, .release = do_done, .opendir = do_open, .releasedir = do_done,
};

int main(int argc, char **argv)
{
	int single = argc > 2 && !strcmp(argv[1], "-s");
	char *words[] = { argv[0], "-oallow_other,default_permissions,fsname=bench", NULL };
	struct fuse_args args = FUSE_ARGS_INIT(2, words);
	struct fuse_loop_config config = { .clone_fd = 0, .max_idle_threads = 10 };
	struct fuse_session *session = fuse_session_new(&args, &operations, sizeof operations, NULL);

	content = malloc(SIZE);
	memset(content, 'x', SIZE);
	make("big", SIZE);
	if (!session || fuse_set_signal_handlers(session) || fuse_session_mount(session, argv[argc - 1]))
		return 1;
	single ? fuse_session_loop(session) : fuse_session_loop_mt(session, &config);
	fuse_session_unmount(session);
	return 0;
}
