/* Counts the system calls that change files below a folder; fails one, or ends the process at it.

   Preloaded into a process, it intercepts the calls of every library, in whatever language it is
   written. Each completed call is one line of the journal: operation, inode, inode of the folder
   that holds the name, inode of the folder that held it before a rename, path, second path, link
   to the overwritten file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include <pthread.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char prefix[PATH_MAX];
static char shadow[PATH_MAX];
static int journal = -1;
static long count, at;
static int error;
static __thread int inside;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* with: errno with which call number `number` fails; 0: the process ends just before that call. */
void interpose_arm(const char *folder, const char *saved, int journal_fd, long number, int with) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    snprintf(shadow, sizeof shadow, "%s", saved);
    journal = journal_fd;
    count = 0;
    at = number;
    error = with;
}

long interpose_count(void) { return count; }

static int below(const char *path) {
    return prefix[0] && !inside && strncmp(path, prefix, strlen(prefix)) == 0;
}

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

static void absolute(int folder, const char *name, char *path) {
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return;
    }
    char base[PATH_MAX] = "";
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
    }
    snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
}

/* Return whether to carry out the call. */
static int permitted(void) {
    pthread_mutex_lock(&lock);
    long number = ++count;
    pthread_mutex_unlock(&lock);
    if (number != at) return 1;
    if (error == 0) _exit(77);
    errno = error;
    return 0;
}

static unsigned long inode(const char *path) {
    struct stat found;
    return lstat(path, &found) == 0 ? (unsigned long)found.st_ino : 0;
}

static unsigned long parent(const char *path) {
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash) *slash = 0;
    return inode(folder);
}

static void record(const char *operation, const char *path, const char *other, const char *saved) {
    unsigned long from = other[0] ? parent(path) : 0;
    int kept = errno;
    char line[4 * PATH_MAX];
    const char *now = other[0] ? other : path;
    int length = snprintf(line, sizeof line, "%s\t%lu\t%lu\t%lu\t%s\t%s\t%s\n", operation, inode(now),
                          parent(now), from, path, other, saved);
    inside = 1;
    if (journal >= 0 && REAL(write)(journal, line, (size_t)length) < 0) abort();
    inside = 0;
    errno = kept;
}

static void record_fd(const char *operation, int fd, const char *path) {
    int kept = errno;
    struct stat found;
    char line[2 * PATH_MAX];
    if (fstat(fd, &found)) return;
    int length = snprintf(line, sizeof line, "%s\t%lu\t0\t0\t%s\t\t\n", operation,
                          (unsigned long)found.st_ino, path);
    inside = 1;
    if (journal >= 0 && REAL(write)(journal, line, (size_t)length) < 0) abort();
    inside = 0;
    errno = kept;
}

#define ON_FD(type, operation, call)                                                              \
    char path[PATH_MAX];                                                                           \
    if (!path_of(fd, path)) return call;                                                           \
    if (!permitted()) return -1;                                                                   \
    type result = call;                                                                            \
    if (result >= 0) record_fd(operation, fd, path);                                               \
    return result;

ssize_t write(int fd, const void *data, size_t size) {
    ON_FD(ssize_t, "write", REAL(write)(fd, data, size))
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t place) {
    ON_FD(ssize_t, "write", REAL(pwrite)(fd, data, size, place))
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
    ON_FD(ssize_t, "write", REAL(pwrite64)(fd, data, size, place))
}
ssize_t writev(int fd, const struct iovec *parts, int number) {
    ON_FD(ssize_t, "write", REAL(writev)(fd, parts, number))
}
ssize_t sendfile(int fd, int from, off_t *place, size_t size);
ssize_t sendfile(int fd, int from, off_t *place, size_t size) {
    ON_FD(ssize_t, "write", REAL(sendfile)(fd, from, place, size))
}
ssize_t sendfile64(int fd, int from, off64_t *place, size_t size);
ssize_t sendfile64(int fd, int from, off64_t *place, size_t size) {
    ON_FD(ssize_t, "write", REAL(sendfile64)(fd, from, place, size))
}
ssize_t copy_file_range(int from, off64_t *place, int fd, off64_t *target, size_t size,
                        unsigned flags) {
    ON_FD(ssize_t, "write", REAL(copy_file_range)(from, place, fd, target, size, flags))
}
int ftruncate(int fd, off_t size) { ON_FD(int, "write", REAL(ftruncate)(fd, size)) }
int ftruncate64(int fd, off64_t size) { ON_FD(int, "write", REAL(ftruncate64)(fd, size)) }
int fsync(int fd) { ON_FD(int, "sync", REAL(fsync)(fd)) }
int fdatasync(int fd) { ON_FD(int, "sync", REAL(fdatasync)(fd)) }

static int opened(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    absolute(folder, name, path);
    if (!(flags & (O_CREAT | O_TRUNC)) || !below(path))
        return REAL(openat64)(folder, name, flags, mode);
    int created = inode(path) == 0;
    if (!permitted()) return -1;
    int fd = REAL(openat64)(folder, name, flags, mode);
    if (fd >= 0) {
        if (created) record("create", path, "", "");
        record_fd("write", fd, path);
    }
    return fd;
}

#define MODE                                                                                       \
    mode_t mode = 0;                                                                               \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                         \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode = va_arg(more, mode_t);                                                               \
        va_end(more);                                                                              \
    }

int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) {
    MODE return opened(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE return opened(folder, path, flags, mode);
}

static int renamed(int from, const char *one, int to, const char *other, unsigned flags) {
    char source[PATH_MAX], target[PATH_MAX], saved[PATH_MAX] = "";
    absolute(from, one, source);
    absolute(to, other, target);
    if (!below(source) && !below(target)) return REAL(renameat2)(from, one, to, other, flags);
    if (!permitted()) return -1;
    struct stat found;
    /* Keep the overwritten file: a power cut may bring it back. */
    if (lstat(target, &found) == 0 && S_ISREG(found.st_mode)) {
        snprintf(saved, sizeof saved, "%.2000s/%ld", shadow, count);
        if (link(target, saved)) saved[0] = 0;
    }
    int result = REAL(renameat2)(from, one, to, other, flags);
    if (result == 0) record("rename", source, target, saved);
    return result;
}

int rename(const char *one, const char *other) {
    return renamed(AT_FDCWD, one, AT_FDCWD, other, 0);
}
int renameat(int from, const char *one, int to, const char *other) {
    return renamed(from, one, to, other, 0);
}
int renameat2(int from, const char *one, int to, const char *other, unsigned flags) {
    return renamed(from, one, to, other, flags);
}

#define ON_PATH(folder, operation, call)                                                           \
    char path[PATH_MAX];                                                                           \
    absolute(folder, name, path);                                                                  \
    if (!below(path)) return call;                                                                 \
    if (!permitted()) return -1;                                                                   \
    int result = call;                                                                             \
    if (result == 0) record(operation, path, "", "");                                              \
    return result;

int mkdir(const char *name, mode_t mode) {
    ON_PATH(AT_FDCWD, "create", REAL(mkdir)(name, mode))
}
int mkdirat(int folder, const char *name, mode_t mode) {
    ON_PATH(folder, "create", REAL(mkdirat)(folder, name, mode))
}
int unlink(const char *name) { ON_PATH(AT_FDCWD, "remove", REAL(unlink)(name)) }
int rmdir(const char *name) { ON_PATH(AT_FDCWD, "remove", REAL(rmdir)(name)) }
int unlinkat(int folder, const char *name, int flags) {
    ON_PATH(folder, "remove", REAL(unlinkat)(folder, name, flags))
}
