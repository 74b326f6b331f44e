#!/usr/bin/env bash
# dlclose returns 0 for a library that stays mapped, because a live thread has yet to run a
# thread-local destructor of it; and when that thread has ended, the library still stays until
# something else is closed.
#
# Seen with glibc 2.36: a thread registers a destructor as C++'s and Rust's thread_local do
# (__cxa_thread_atexit_impl). dlclose, called by another thread, returns 0, and /proc/self/maps
# shows the library. After the thread has ended, which runs the destructor, it is mapped as before.
# Opening and closing another library unmaps both.
#
# So "dlclose returned 0" does not say that code is gone, and no call says when it goes: look at
# what is mapped, and close something else to have the linker look again.
#
# Needs cc. Exit 0: seen as described. 1: something else was seen. 77: cannot be tried here.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
getconf GNU_LIBC_VERSION || { echo "needs glibc"; exit 77; }
cat >"$work/keeps.c" <<'C'
extern int __cxa_thread_atexit_impl(void (*)(void *), void *, void *);
extern void *__dso_handle;
static void destroy(void *flag) { *(int *)flag = 1; }
int touch(int *flag) { return __cxa_thread_atexit_impl(destroy, flag, &__dso_handle); }
C
echo 'int other;' >"$work/other.c"
cat >"$work/try.c" <<'C'
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>

static sem_t touched, may_end;
static int destroyed;

static void *toucher(void *touch)
{
    ((int (*)(int *))touch)(&destroyed);
    sem_post(&touched);
    sem_wait(&may_end);
    return 0;
}

static int is_mapped(const char *name)
{
    char line[512];
    int found = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps))
        found |= strstr(line, name) != 0;
    fclose(maps);
    return found;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    if (argc < 3)
        return 2;
    sem_init(&touched, 0, 0);
    sem_init(&may_end, 0, 0);
    void *library = dlopen(argv[1], RTLD_NOW);
    pthread_create(&thread, 0, toucher, dlsym(library, "touch"));
    sem_wait(&touched);
    int closed = dlclose(library), while_alive = is_mapped("keeps.so");
    sem_post(&may_end);
    pthread_join(thread, 0);
    int after = is_mapped("keeps.so");
    dlclose(dlopen(argv[2], RTLD_NOW));
    int at_last = is_mapped("keeps.so");
    printf("dlclose returned %d; mapped while the thread lives: %d, after its end: %d (destructor "
           "run: %d), after another dlclose: %d\n", closed, while_alive, after, destroyed, at_last);
    return !(closed == 0 && while_alive && after && destroyed && !at_last);
}
C
cc -shared -fPIC -o "$work/keeps.so" "$work/keeps.c"
cc -shared -fPIC -o "$work/other.so" "$work/other.c"
cc -O1 -pthread -o "$work/try" "$work/try.c" -ldl
"$work/try" "$work/keeps.so" "$work/other.so"
