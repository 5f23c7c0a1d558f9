// Loaded before libc (LD_PRELOAD): file operations on paths below one folder fail on request.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *kind = "", *below = "";
static int first = 0, last = 0, code = 0, seen = 0;

// From now on the calls number first to last (from 1) of a kind set errno and fail.
void fail_calls(const char *kind_, const char *below_, int first_, int last_, int code_) {
    kind = strdup(kind_), below = strdup(below_);
    first = first_, last = last_, code = code_, seen = 0;
}
int calls_seen(void) { return seen; }

static int fails(const char *name, const char *path) {
    if (strcmp(name, kind) || !path || strncmp(path, below, strlen(below))) return 0;
    ++seen;
    if (seen < first || seen > last) return 0;
    errno = code;
    return 1;
}
static int fails_at(const char *name, int folder, const char *path) {
    if (path && path[0] != '/' && folder != AT_FDCWD && !strcmp(name, kind)) {
        char link[64], real[2 * PATH_MAX];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t size = readlink(link, real, PATH_MAX);
        if (size < 0) return 0;
        snprintf(real + size, PATH_MAX, "/%s", path);
        return fails(name, real);
    }
    return fails(name, path);
}
static int fails_fd(const char *name, int fd) {
    return !strcmp(name, kind) && fails_at(name, fd, "");
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define PLAIN(name, kind, test, type, parameters, arguments) \
    type name parameters { return test ? (type)-1 : NEXT(name) arguments; }
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return fails("open", path) ? -1 : NEXT(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return fails_at("open", folder, path) ? -1 : NEXT(name)(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)
PLAIN(read, "read", fails_fd("read", fd), ssize_t, (int fd, void *to, size_t size), (fd, to, size))
PLAIN(write, "write", fails_fd("write", fd), ssize_t, (int fd, const void *from, size_t size), (fd, from, size))
PLAIN(fsync, "fsync", fails_fd("fsync", fd), int, (int fd), (fd))
PLAIN(flock, "flock", fails_fd("flock", fd), int, (int fd, int operation), (fd, operation))
PLAIN(rename, "rename", fails("rename", from), int, (const char *from, const char *to), (from, to))
PLAIN(unlink, "unlink", fails("unlink", path), int, (const char *path), (path))
PLAIN(rmdir, "unlink", fails("unlink", path), int, (const char *path), (path))
PLAIN(unlinkat, "unlink", fails_at("unlink", folder, path), int, (int folder, const char *path, int flags), (folder, path, flags))
PLAIN(mkdir, "mkdir", fails("mkdir", path), int, (const char *path, mode_t mode), (path, mode))
PLAIN(chmod, "chmod", fails("chmod", path), int, (const char *path, mode_t mode), (path, mode))
PLAIN(stat, "stat", fails("stat", path), int, (const char *path, struct stat *to), (path, to))
PLAIN(lstat, "stat", fails("stat", path), int, (const char *path, struct stat *to), (path, to))
PLAIN(fstat, "stat", fails_fd("stat", fd), int, (int fd, struct stat *to), (fd, to))
PLAIN(stat64, "stat", fails("stat", path), int, (const char *path, struct stat64 *to), (path, to))
PLAIN(lstat64, "stat", fails("stat", path), int, (const char *path, struct stat64 *to), (path, to))
PLAIN(fstat64, "stat", fails_fd("stat", fd), int, (int fd, struct stat64 *to), (fd, to))
PLAIN(fstatat, "stat", fails_at("stat", folder, path), int, (int folder, const char *path, struct stat *to, int flags), (folder, path, to, flags))
PLAIN(fstatat64, "stat", fails_at("stat", folder, path), int, (int folder, const char *path, struct stat64 *to, int flags), (folder, path, to, flags))
PLAIN(mmap, "mmap", (fd >= 0 && fails_fd("mmap", fd)), void *, (void *at, size_t size, int protection, int flags, int fd, off_t offset), (at, size, protection, flags, fd, offset))
PLAIN(mmap64, "mmap", (fd >= 0 && fails_fd("mmap", fd)), void *, (void *at, size_t size, int protection, int flags, int fd, off64_t offset), (at, size, protection, flags, fd, offset))
DIR *opendir(const char *path) { return fails("list", path) ? NULL : NEXT(opendir)(path); }
DIR *fdopendir(int fd) { return fails_fd("list", fd) ? NULL : NEXT(fdopendir)(fd); }
// These return the error.
int posix_fallocate(int fd, off_t offset, off_t size) {
    return fails_fd("fallocate", fd) ? code : NEXT(posix_fallocate)(fd, offset, size);
}
int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    return fails_fd("fallocate", fd) ? code : NEXT(posix_fallocate64)(fd, offset, size);
}
