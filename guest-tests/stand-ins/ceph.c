/* A stand-in for librados and librbd: as much of their C interface as the daemon uses, on files of
 * a folder. Tests build it, and put it where the dynamic linker looks first, so that what they try
 * needs no cluster. It is no model of Ceph: only of what its functions answer.
 *
 * FAKE_CEPH names the folder. In there:
 *   POOL.IMAGE            the data            POOL.IMAGE.lock     the address that has the lock
 *   POOL.IMAGE.note.KEY   metadata            POOL.IMAGE.watch.N  one that has it open
 *   blocked.N             N is locked out: -108 from then on
 *   down                  while it exists, requests and calls wait (an OSD)
 *   full                  while it exists, changes fail with -28
 *   deaf                  while it exists, nothing answers a connect (a monitor)
 *   stranger              while it exists, no user is let in
 *   slow                  how many milliseconds it takes to get a lock, or to close an image
 *   enlarge               how large the image becomes when its size was asked for once more
 *   conf.KEY              what was set        POOL.IMAGE.own.KEY  what the image has set of its own
 * A client that has an image open and whose process is gone is waited for by each change of the
 * image's header, as Ceph does: 5 s.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#include <dirent.h>

typedef void (*callback)(void *completion, void *arg);
enum what { READ, WRITE, FLUSH, ZERO };

struct cluster { char address[64]; };
struct pool { struct cluster *cluster; char name[128]; };
struct completion {
    callback called;
    void *arg;
    long result;
    enum what what;
    const struct iovec *vectors;
    int count;
    uint64_t offset, len;
    void *copy;
    struct completion *next;
};
struct image {
    struct pool *pool;
    char name[256];
    int file, ending;
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct completion *first, **last;
};

static void path(char *out, const char *a, const char *b, const char *c) {
    snprintf(out, 512, "%s/%s%s%s", getenv("FAKE_CEPH"), a, b, c);
}

static int there(const char *a, const char *b, const char *c) {
    char name[512];
    path(name, a, b, c);
    return access(name, F_OK) == 0;
}

static int get(const char *image, const char *what, const char *key, char *out, size_t room) {
    char name[512], suffix[256];
    snprintf(suffix, sizeof suffix, "%s%s", what, key);
    path(name, image, suffix, "");
    int file = open(name, O_RDONLY);
    if (file < 0) return -errno;
    ssize_t len = read(file, out, room - 1);
    close(file);
    if (len < 0) return -EIO;
    out[len] = 0;
    return 0;
}

static int put(const char *image, const char *what, const char *key, const char *value, int flags) {
    char name[512], suffix[256];
    snprintf(suffix, sizeof suffix, "%s%s", what, key);
    path(name, image, suffix, "");
    int file = open(name, O_WRONLY | O_CREAT | flags, 0600);
    if (file < 0) return -errno;
    int wrote = write(file, value, strlen(value)) == (ssize_t)strlen(value);
    close(file);
    return wrote ? 0 : -EIO;
}

static void drop(const char *image, const char *what, const char *key) {
    char name[512], suffix[256];
    snprintf(suffix, sizeof suffix, "%s%s", what, key);
    path(name, image, suffix, "");
    unlink(name);
}

/* A number in a file of the folder, or 0. */
static uint64_t number(const char *name) {
    char text[64];
    return get(name, "", "", text, sizeof text) ? 0 : strtoull(text, NULL, 10);
}

static void wait_while_down(void) {
    while (there("down", "", "")) usleep(1000);
}

static int blocked(struct image *image) {
    return there("blocked.", image->pool->cluster->address, "");
}

/* librados */

int rados_create(void **out, const char *id) {
    static int number;
    struct cluster *cluster = calloc(1, sizeof *cluster);
    (void)id;
    snprintf(cluster->address, sizeof cluster->address, "%d-%d", getpid(),
             __sync_add_and_fetch(&number, 1));
    *out = cluster;
    return 0;
}
int rados_conf_read_file(void *cluster, const char *name) {
    (void)cluster;
    return name && access(name, R_OK) ? -errno : 0;
}
int rados_conf_set(void *cluster, const char *key, const char *value) {
    (void)cluster;
    return put("conf.", key, "", value, O_TRUNC);
}
int rados_connect(void *cluster) {
    (void)cluster;
    if (there("stranger", "", "")) return -EACCES;
    if (!there("deaf", "", "")) return 0;
    usleep(100000);
    return -ETIMEDOUT;
}
void rados_shutdown(void *cluster) { free(cluster); }
int rados_cluster_fsid(void *cluster, char *out, size_t room) {
    (void)cluster;
    return snprintf(out, room, "0-0-0");
}
int rados_ioctx_create(void *cluster, const char *name, void **out) {
    if (strcmp(name, "rbd")) return -ENOENT;
    struct pool *pool = calloc(1, sizeof *pool);
    pool->cluster = cluster;
    snprintf(pool->name, sizeof pool->name, "%s", name);
    *out = pool;
    return 0;
}
void rados_ioctx_destroy(void *pool) { free(pool); }
void rados_ioctx_set_namespace(void *pool, const char *name) { (void)pool, (void)name; }
int64_t rados_ioctx_get_id(void *pool) { (void)pool; return 1; }
void rados_set_pool_full_try(void *pool) { (void)pool; }

/* librbd: images */

static void carry_out(struct image *image, struct completion *it) {
    static const char zeros[1 << 16];
    uint64_t done = 0;
    wait_while_down();
    if (blocked(image)) {
        it->result = -ESHUTDOWN;
    } else if (it->what == READ) {
        it->result = preadv(image->file, it->vectors, it->count, it->offset);
    } else if (there("full", "", "")) {
        it->result = it->what == FLUSH ? 0 : -ENOSPC;
    } else if (it->what == WRITE) {
        it->result = pwrite(image->file, it->copy, it->len, it->offset) < 0 ? -EIO : 0;
    } else if (it->what == ZERO) {
        while (done < it->len) {
            uint64_t piece = it->len - done < sizeof zeros ? it->len - done : sizeof zeros;
            if (pwrite(image->file, zeros, piece, it->offset + done) < 0) it->result = -EIO;
            done += piece;
        }
    }
    free(it->copy);
    it->called(it, it->arg);
}

static void *serve(void *arg) {
    struct image *image = arg;
    pthread_mutex_lock(&image->mutex);
    while (image->first || !image->ending) {
        struct completion *it = image->first;
        if (!it) {
            pthread_cond_wait(&image->changed, &image->mutex);
            continue;
        }
        image->first = it->next;
        if (!image->first) image->last = &image->first;
        pthread_mutex_unlock(&image->mutex);
        carry_out(image, it);
        pthread_mutex_lock(&image->mutex);
    }
    pthread_mutex_unlock(&image->mutex);
    return NULL;
}

static int open_image(struct pool *pool, const char *name, void **out, int flags) {
    char file[512];
    struct image *image = calloc(1, sizeof *image);
    image->pool = pool;
    snprintf(image->name, sizeof image->name, "%s.%s", pool->name, name);
    path(file, image->name, "", "");
    image->file = open(file, flags);
    if (image->file < 0) {
        free(image);
        return -errno;
    }
    image->last = &image->first;
    pthread_mutex_init(&image->mutex, NULL);
    pthread_cond_init(&image->changed, NULL);
    pthread_create(&image->thread, NULL, serve, image);
    put(image->name, ".watch.", pool->cluster->address, "", 0);
    wait_while_down();
    *out = image;
    return 0;
}
int rbd_open(void *pool, const char *name, void **out, const char *snapshot) {
    return snapshot ? -EROFS : open_image(pool, name, out, O_RDWR);
}
int rbd_open_read_only(void *pool, const char *name, void **out, const char *snapshot) {
    (void)snapshot;
    return open_image(pool, name, out, O_RDONLY);
}
int rbd_close(void *arg) {
    struct image *image = arg;
    pthread_mutex_lock(&image->mutex);
    image->ending = 1;
    pthread_cond_signal(&image->changed);
    pthread_mutex_unlock(&image->mutex);
    pthread_join(image->thread, NULL);
    usleep(1000 * number("slow"));
    drop(image->name, ".watch.", image->pool->cluster->address);
    close(image->file);
    free(image);
    return 0;
}
struct setting { char *name, *value; int source; };
int rbd_config_image_list(void *arg, struct setting *settings, int *count) {
    struct image *image = arg;
    char value[64];
    int room = *count;
    DIR *folder = opendir(getenv("FAKE_CEPH"));
    *count = 0;
    for (struct dirent *entry; (entry = readdir(folder));) {
        if (strncmp(entry->d_name, "conf.rbd_", 9)) continue;
        const char *key = entry->d_name + 5;
        int source = get(image->name, ".own.", key, value, sizeof value) ? 0 : 2;
        if (!source) get(entry->d_name, "", "", value, sizeof value);
        if (*count < room)
            settings[*count] = (struct setting){strdup(key), strdup(value), source};
        ++*count;
    }
    closedir(folder);
    return *count > room ? -ERANGE : 0;
}
void rbd_config_image_list_cleanup(struct setting *settings, int count) {
    while (count--) free(settings[count].name), free(settings[count].value);
}
int rbd_get_size(void *image, uint64_t *size) {
    struct stat stat;
    int file = ((struct image *)image)->file;
    uint64_t then = number("enlarge");
    if (fstat(file, &stat)) return -errno;
    *size = stat.st_size;
    if (!then) return 0;
    drop("enlarge", "", "");
    return ftruncate(file, then) ? -errno : 0;
}
int rbd_get_features(void *image, uint64_t *features) {
    *features = there(((struct image *)image)->name, ".unlocked", "") ? 1 : 5;
    return 0;
}
int rbd_get_id(void *image, char *out, size_t room) {
    snprintf(out, room, "%s", ((struct image *)image)->name);
    return 0;
}
typedef int (*progress)(uint64_t done, uint64_t of, void *arg);
int rbd_resize2(void *arg, uint64_t size, bool may_shrink, progress called, void *with) {
    struct image *image = arg;
    struct stat stat;
    if (blocked(image)) return -ESHUTDOWN;
    if (fstat(image->file, &stat)) return -errno;
    called(0, 1, with);
    if (!may_shrink && size < (uint64_t)stat.st_size) return -EINVAL;
    return ftruncate(image->file, size) ? -errno : 0;
}

/* librbd: the lock */

static int owner_of(struct image *image, char *owner) {
    return get(image->name, ".lock", "", owner, 64);
}
int rbd_is_exclusive_lock_owner(void *arg, int *is_owner) {
    struct image *image = arg;
    char owner[64];
    *is_owner = !owner_of(image, owner) && !strcmp(owner, image->pool->cluster->address);
    return *is_owner && blocked(image) ? -ESHUTDOWN : 0;
}
int rbd_lock_acquire(void *arg, int mode) {
    struct image *image = arg;
    char owner[64];
    (void)mode;
    wait_while_down();
    usleep(1000 * number("slow"));
    if (blocked(image)) return -ESHUTDOWN;
    if (!owner_of(image, owner) && !there(image->name, ".watch.", owner))
        drop(image->name, ".lock", "");
    int made = put(image->name, ".lock", "", image->pool->cluster->address, O_EXCL);
    if (made == -EEXIST && !owner_of(image, owner))
        return strcmp(owner, image->pool->cluster->address) ? -EROFS : 0;
    return made;
}
int rbd_lock_release(void *arg) {
    struct image *image = arg;
    int is_owner;
    wait_while_down();
    if (blocked(image)) return -ESHUTDOWN;
    rbd_is_exclusive_lock_owner(arg, &is_owner);
    if (!is_owner) return -EINVAL;
    drop(image->name, ".lock", "");
    return 0;
}
int rbd_lock_get_owners(void *image, int *mode, char **owners, size_t *count) {
    char owner[64];
    wait_while_down();
    if (blocked(image)) return -ESHUTDOWN;
    if (owner_of(image, owner)) return -ENOENT;
    *mode = 0;
    owners[0] = strdup(owner);
    *count = 1;
    return 0;
}
void rbd_lock_get_owners_cleanup(char **owners, size_t count) {
    while (count--) free(owners[count]);
}
int rbd_lock_break(void *arg, int mode, const char *owner) {
    struct image *image = arg;
    char now[64];
    (void)mode;
    if (blocked(image)) return -ESHUTDOWN;
    if (owner_of(image, now)) return -ENOENT;
    if (strcmp(now, owner)) return -EBUSY;
    put("blocked.", owner, "", "", 0);
    drop(image->name, ".lock", "");
    drop(image->name, ".watch.", owner);
    return 0;
}

/* librbd: notes and watchers */

struct watcher { char *address; int64_t id; uint64_t cookie; };
int rbd_watchers_list(void *arg, struct watcher *watchers, size_t *count) {
    struct image *image = arg;
    char prefix[512];
    size_t room = *count;
    DIR *folder = opendir(getenv("FAKE_CEPH"));
    snprintf(prefix, sizeof prefix, "%s.watch.", image->name);
    *count = 0;
    for (struct dirent *entry; (entry = readdir(folder));)
        if (!strncmp(entry->d_name, prefix, strlen(prefix)) && *count < room)
            watchers[(*count)++].address = strdup(entry->d_name + strlen(prefix));
    closedir(folder);
    return 0;
}
void rbd_watchers_list_cleanup(struct watcher *watchers, size_t count) {
    while (count--) free(watchers[count].address);
}
/* Whether a client's process has ended: its address begins with the number. */
static int is_gone(const char *address) {
    char name[64], to[8];
    snprintf(name, sizeof name, "/proc/%d/exe", atoi(address));
    return atoi(address) && readlink(name, to, sizeof to) < 0 && errno == ENOENT;
}
/* Tells the others of a change of the header. */
static void tell(void *image) {
    struct watcher watchers[64] = {0};
    size_t count = 64;
    rbd_watchers_list(image, watchers, &count);
    for (size_t i = 0; i < count; i++)
        if (is_gone(watchers[i].address)) sleep(5);
    rbd_watchers_list_cleanup(watchers, count);
}
int rbd_metadata_get(void *image, const char *key, char *out, size_t *room) {
    if (blocked(image)) return -ESHUTDOWN;
    return get(((struct image *)image)->name, ".note.", key, out, *room);
}
int rbd_metadata_set(void *image, const char *key, const char *value) {
    if (blocked(image)) return -ESHUTDOWN;
    tell(image);
    return put(((struct image *)image)->name, ".note.", key, value, O_TRUNC);
}

/* librbd: requests */

int rbd_aio_create_completion(void *arg, callback called, void **out) {
    struct completion *it = calloc(1, sizeof *it);
    it->called = called;
    it->arg = arg;
    *out = it;
    return 0;
}
ssize_t rbd_aio_get_return_value(void *completion) {
    return ((struct completion *)completion)->result;
}
void rbd_aio_release(void *completion) { free(completion); }

static int begin(struct image *image, struct completion *it, enum what what, uint64_t offset,
                 uint64_t len) {
    it->what = what;
    it->offset = offset;
    it->len = len;
    pthread_mutex_lock(&image->mutex);
    *image->last = it;
    image->last = &it->next;
    pthread_cond_signal(&image->changed);
    pthread_mutex_unlock(&image->mutex);
    return 0;
}
int rbd_aio_readv(void *image, const struct iovec *vectors, int count, uint64_t offset, void *arg) {
    struct completion *it = arg;
    it->vectors = vectors;
    it->count = count;
    return begin(image, it, READ, offset, 0);
}
int rbd_aio_writev(void *image, const struct iovec *vectors, int count, uint64_t offset,
                   void *arg) {
    struct completion *it = arg;
    uint64_t len = 0, at = 0;
    for (int i = 0; i < count; i++) len += vectors[i].iov_len;
    it->copy = malloc(len ? len : 1);
    for (int i = 0; i < count; at += vectors[i++].iov_len)
        memcpy((char *)it->copy + at, vectors[i].iov_base, vectors[i].iov_len);
    return begin(image, it, WRITE, offset, len);
}
int rbd_aio_flush(void *image, void *it) { return begin(image, it, FLUSH, 0, 0); }
int rbd_aio_discard(void *image, uint64_t offset, uint64_t len, void *it) {
    return begin(image, it, ZERO, offset, len);
}
int rbd_aio_write_zeroes(void *image, uint64_t offset, size_t len, void *it, int how, int flags) {
    (void)how, (void)flags;
    return begin(image, it, ZERO, offset, len);
}
