/* Kills a process at a chosen system call on a file below a chosen folder.

   cc -shared -fPIC -o kill_library.so kill_library.c -ldl
   LD_PRELOAD=kill_library.so KILL_AT_ROOT=/runs/a KILL_AT="rename 2 after checkpoints/4" python ...

   Preloaded, this library stands between the process and libc, so that it sees the calls of Python and those
   of TensorStore, which is written in C++. Environment variables:

   KILL_AT_ROOT  absolute path, without links, of the folder to observe; other files are ignored
   KILL_AT_LOG   a file outside that folder, to which one line is appended for each call: kind and path; and
                 one that begins with "killed" for the call at which the process is killed
   KILL_AT       KIND NUMBER WHEN PATTERN: the process gets SIGKILL at call NUMBER, from 1, of KIND whose path
                 relative to the folder matches PATTERN, in which * also matches /. WHEN is before, half or
                 after; half is for writes, of which only the first half of the bytes reaches the file.

   Kinds: rename (the path is the new one), fsync (also fdatasync), unlink, rmdir, mkdir, create (opening a
   file for writing), write, truncate.

   The variables are read when the library is loaded, and by kill_at_begin(), which a forked process calls. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX], kind_wanted[16], when_wanted[16], pattern[PATH_MAX];
static int number_wanted, log_fd = -1;
static atomic_int seen;

__attribute__((constructor)) void kill_at_begin(void) {
  const char *folder = getenv("KILL_AT_ROOT"), *log = getenv("KILL_AT_LOG"), *point = getenv("KILL_AT");
  snprintf(root, sizeof root, "%s", folder ? folder : "");
  if (log_fd >= 0) syscall(SYS_close, log_fd);
  int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
  log_fd = log ? (int)syscall(SYS_openat, AT_FDCWD, log, flags, 0644) : -1;
  number_wanted = 0;
  atomic_store(&seen, 0);
  const char *form = "%15s %d %15s %4095[^\n]";
  if (point && sscanf(point, form, kind_wanted, &number_wanted, when_wanted, pattern) != 4) {
    fprintf(stderr, "KILL_AT is '%s': it must be KIND NUMBER WHEN PATTERN\n", point);
    _exit(2);
  }
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

static void note(const char *what, const char *kind, const char *path) {
  char line[PATH_MAX + 32];
  int size = snprintf(line, sizeof line, "%s%s %s\n", what, kind, path);
  if (log_fd >= 0) syscall(SYS_write, log_fd, line, size < (int)sizeof line ? size : (int)sizeof line - 1);
}

/* Logs a call; returns whether it is the one at which the process dies. If WHEN is before, it dies here. */
static int chosen(const char *kind, const char *path) {
  size_t length = strlen(root);
  if (!length || strncmp(path, root, length) || path[length] != '/') return 0;
  path += length + 1;
  note("", kind, path);
  if (!number_wanted || strcmp(kind, kind_wanted) || fnmatch(pattern, path, 0)) return 0;
  if (atomic_fetch_add(&seen, 1) + 1 != number_wanted) return 0;
  note("killed ", kind, path);
  if (!strcmp(when_wanted, "before")) die();
  return 1;
}

static void link_target(const char *link, char *path) {
  ssize_t size = readlink(link, path, PATH_MAX - 1);
  path[size < 0 ? 0 : size] = 0;
}

static int chosen_at(const char *kind, int folder, const char *name) {
  char link[64], base[PATH_MAX], path[2 * PATH_MAX];
  if (!*root || !name) return 0;
  if (*name == '/') return chosen(kind, name);
  if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
  link_target(link, base);
  snprintf(path, sizeof path, "%s/%s", base, name);
  return chosen(kind, path);
}

static int chosen_fd(const char *kind, int file) {
  char link[64], path[PATH_MAX];
  if (!*root) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  link_target(link, path);
  return chosen(kind, path);
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))
#define CALL(kind_of_path, call)             \
  do {                                       \
    int last = kind_of_path;                 \
    __typeof__(call) result = call;          \
    if (last) die();                         \
    return result;                           \
  } while (0)

int rename(const char *from, const char *to) {
  CALL(chosen_at("rename", AT_FDCWD, to), REAL(rename)(from, to));
}
int renameat(int a, const char *from, int b, const char *to) {
  CALL(chosen_at("rename", b, to), REAL(renameat)(a, from, b, to));
}
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  CALL(chosen_at("rename", b, to), REAL(renameat2)(a, from, b, to, flags));
}
int fsync(int file) { CALL(chosen_fd("fsync", file), REAL(fsync)(file)); }
int fdatasync(int file) { CALL(chosen_fd("fsync", file), REAL(fdatasync)(file)); }
int unlink(const char *path) { CALL(chosen_at("unlink", AT_FDCWD, path), REAL(unlink)(path)); }
int unlinkat(int folder, const char *path, int flags) {
  const char *kind = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
  CALL(chosen_at(kind, folder, path), REAL(unlinkat)(folder, path, flags));
}
int rmdir(const char *path) { CALL(chosen_at("rmdir", AT_FDCWD, path), REAL(rmdir)(path)); }
int mkdir(const char *path, mode_t mode) {
  CALL(chosen_at("mkdir", AT_FDCWD, path), REAL(mkdir)(path, mode));
}
int mkdirat(int folder, const char *path, mode_t mode) {
  CALL(chosen_at("mkdir", folder, path), REAL(mkdirat)(folder, path, mode));
}
int ftruncate(int file, off_t size) { CALL(chosen_fd("truncate", file), REAL(ftruncate)(file, size)); }
int ftruncate64(int file, off64_t size) { CALL(chosen_fd("truncate", file), REAL(ftruncate64)(file, size)); }

#define WRITES (O_CREAT | O_TRUNC)
#define OPEN(folder, call)                                                 \
  mode_t mode = 0;                                                         \
  if (flags & (O_CREAT | __O_TMPFILE)) {                                   \
    va_list more;                                                          \
    va_start(more, flags);                                                 \
    mode = va_arg(more, mode_t);                                           \
    va_end(more);                                                          \
  }                                                                        \
  CALL(flags & WRITES ? chosen_at("create", folder, path) : 0, call)

int open(const char *path, int flags, ...) { OPEN(AT_FDCWD, REAL(open)(path, flags, mode)); }
int open64(const char *path, int flags, ...) { OPEN(AT_FDCWD, REAL(open64)(path, flags, mode)); }
int openat(int folder, const char *path, int flags, ...) {
  OPEN(folder, REAL(openat)(folder, path, flags, mode));
}
int openat64(int folder, const char *path, int flags, ...) {
  OPEN(folder, REAL(openat64)(folder, path, flags, mode));
}
FILE *fopen(const char *path, const char *mode) {
  CALL(*mode == 'r' ? 0 : chosen_at("create", AT_FDCWD, path), REAL(fopen)(path, mode));
}
FILE *fopen64(const char *path, const char *mode) {
  CALL(*mode == 'r' ? 0 : chosen_at("create", AT_FDCWD, path), REAL(fopen64)(path, mode));
}

static int halved(void) { return !strcmp(when_wanted, "half"); }

ssize_t write(int file, const void *bytes, size_t size) {
  int last = chosen_fd("write", file);
  ssize_t result = REAL(write)(file, bytes, last && halved() ? size / 2 : size);
  if (last) die();
  return result;
}
ssize_t pwrite(int file, const void *bytes, size_t size, off_t at) {
  int last = chosen_fd("write", file);
  ssize_t result = REAL(pwrite)(file, bytes, last && halved() ? size / 2 : size, at);
  if (last) die();
  return result;
}
ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t at) {
  int last = chosen_fd("write", file);
  ssize_t result = REAL(pwrite64)(file, bytes, last && halved() ? size / 2 : size, at);
  if (last) die();
  return result;
}
ssize_t writev(int file, const struct iovec *parts, int count) {
  int last = chosen_fd("write", file);
  if (last && halved() && count) {
    REAL(write)(file, parts[0].iov_base, count == 1 ? parts[0].iov_len / 2 : parts[0].iov_len);
    die();
  }
  ssize_t result = REAL(writev)(file, parts, count);
  if (last) die();
  return result;
}
