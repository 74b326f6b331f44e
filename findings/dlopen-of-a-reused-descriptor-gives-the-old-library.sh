#!/usr/bin/env bash
# dlopen of /proc/self/fd/N gives the library that was loaded under that name before, although N is
# another file now.
#
# Seen with glibc 2.36 and Linux 6.18: a library in a memfd with number N is loaded through
# /proc/self/fd/N, the descriptor is closed, and another library in a new memfd, which gets the same
# number, is loaded through the same path. dlopen returns the first library's handle and its
# functions, without opening anything. It compares names before it looks at files, and device and
# inode only afterwards. With another spelling of the same path (/proc//self/fd/N) the second
# library is loaded.
#
# So a program that loads plugins from memory files has to use each name once, or load again what it
# has replaced.
#
# Needs cc. Exit 0: seen as described. 1: something else was seen. 77: cannot be tried here.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
getconf GNU_LIBC_VERSION || { echo "needs glibc"; exit 77; }
cat >"$work/try.c" <<'C'
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <unistd.h>

static int in_memory(const char *path)
{
    int file = open(path, O_RDONLY), memory = memfd_create("library", 0);
    while (sendfile(memory, file, 0, 1 << 20) > 0)
        ;
    close(file);
    return memory;
}

static int number_of(void *library)
{
    int (*number)(void) = library ? (int (*)(void))dlsym(library, "number") : 0;
    return number ? number() : -1;
}

int main(int argc, char **argv)
{
    char name[64], other[64];
    if (argc < 3)
        return 2;
    int fd = in_memory(argv[1]);
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    void *first = dlopen(name, RTLD_NOW);
    close(fd);
    int again = in_memory(argv[2]);
    void *second = dlopen(name, RTLD_NOW);
    snprintf(other, sizeof other, "/proc//self/fd/%d", again);
    void *third = dlopen(other, RTLD_NOW);
    printf("%s: library %d; the same name, another file: library %d (the same handle: %d); %s: "
           "library %d\n", name, number_of(first), number_of(second), first == second, other,
           number_of(third));
    return !(fd == again && number_of(first) == 1 && number_of(second) == 1 && first == second &&
             number_of(third) == 2);
}
C
for number in 1 2; do
    echo "int number(void) { return $number; }" >"$work/$number.c"
    cc -shared -fPIC -o "$work/$number.so" "$work/$number.c"
done
cc -O1 -o "$work/try" "$work/try.c" -ldl
"$work/try" "$work/1.so" "$work/2.so"
