#!/usr/bin/env bash
# io_uring can leave IORING_SQ_TASKRUN set when there is nothing to hand over, and goes on doing so
# when it is called.
#
# Seen with Linux 6.18.44, on two CPUs: a ring with IORING_SETUP_DEFER_TASKRUN and
# IORING_SETUP_TASKRUN_FLAG has 32 reads of a pipe in flight, and another thread writes 23 bytes at
# once and then one byte at a time. When all 32 completions have been taken, so that nothing is in
# flight any more, the flag is still set, once in some thousand rounds. It says that io_uring_enter
# with IORING_ENTER_GETEVENTS has something to hand over. Called, it brings nothing, and the flag
# stays. poll(2) on the ring says that nothing is there. The kernel hands over 20 at a time; a
# completion that comes while the rest is handed over goes with it, and has set the flag before.
#
# So a program that calls the kernel "as long as the flag is set" calls for ever. After a call that
# brought nothing it has to ask with poll(2), which looks at the kernel's lists and not at the flag.
#
# Needs io_uring (Linux 6.1), cc, and two idle CPUs. Exit 0: seen as described. 1: something else
# was seen. 77: cannot be tried here, or other programs keep the CPUs.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 77; }
(($(nproc) > 1)) || { echo "needs two CPUs"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "kernel $(uname -r), $(cc --version | head -n 1)"
cat >"$work/try.c" <<'C'
#define _GNU_SOURCE
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { READS = 32, AT_ONCE = 23, ROUNDS = 300000, ENOUGH = 3 };

static int writing;
static atomic_uint round_asked;

static void *write_bytes(void *unused)
{
    char bytes[AT_ONCE] = {0};
    unsigned done = 0;
    for (;;) {
        while (atomic_load(&round_asked) == done)
            ;
        done++;
        if (write(writing, bytes, AT_ONCE) != AT_ONCE)
            exit(2);
        for (int more = AT_ONCE; more < READS; more++) {
            for (volatile unsigned pause = 0; pause < done % 997; pause++)
                ;
            if (write(writing, bytes, 1) != 1)
                exit(2);
        }
    }
    return unused;
}

int main(void)
{
    struct io_uring_params params = {
        .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
    };
    int ring = syscall(SYS_io_uring_setup, READS, &params);
    if (ring < 0) {
        perror("io_uring_setup");
        return 77;
    }
    char *sq = mmap(0, params.sq_off.array + params.sq_entries * 4, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
    char *cq = mmap(0, params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe),
                    PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_CQ_RING);
    struct io_uring_sqe *sqes = mmap(0, params.sq_entries * sizeof *sqes, PROT_READ | PROT_WRITE,
                                     MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQES);
    int ends[2];
    if (sq == MAP_FAILED || cq == MAP_FAILED || sqes == MAP_FAILED || pipe(ends)) {
        perror("making the ring");
        return 77;
    }
    writing = ends[1];
    _Atomic unsigned *sq_tail = (void *)(sq + params.sq_off.tail);
    _Atomic unsigned *sq_flags = (void *)(sq + params.sq_off.flags);
    _Atomic unsigned *cq_head = (void *)(cq + params.cq_off.head);
    _Atomic unsigned *cq_tail = (void *)(cq + params.cq_off.tail);
    unsigned *array = (void *)(sq + params.sq_off.array);
    pthread_t thread;
    pthread_create(&thread, 0, write_bytes, 0);
    static char bytes[READS];
    unsigned of_nothing = 0, still = 0, readable = 0, round = 0;
    for (; round < ROUNDS && of_nothing < ENOUGH; round++) {
        unsigned tail = atomic_load(sq_tail);
        for (unsigned at = 0; at < READS; at++, tail++) {
            unsigned slot = tail & (params.sq_entries - 1);
            memset(&sqes[slot], 0, sizeof *sqes);
            sqes[slot].opcode = IORING_OP_READ;
            sqes[slot].fd = ends[0];
            sqes[slot].addr = (uintptr_t)&bytes[at];
            sqes[slot].len = 1;
            array[slot] = slot;
        }
        atomic_store(sq_tail, tail);
        if (syscall(SYS_io_uring_enter, ring, READS, 0, 0, 0, 0) != READS) {
            perror("submitting");
            return 77;
        }
        atomic_store(&round_asked, round + 1);
        for (unsigned taken = 0; taken < READS;) {
            if (atomic_load(sq_flags) & IORING_SQ_TASKRUN)
                syscall(SYS_io_uring_enter, ring, 0, 0, IORING_ENTER_GETEVENTS, 0, 0);
            unsigned head = atomic_load(cq_head), new = atomic_load(cq_tail);
            taken += new - head;
            atomic_store(cq_head, new);
        }
        /* All that was submitted has been taken. */
        if (atomic_load(sq_flags) & IORING_SQ_TASKRUN) {
            of_nothing++;
            syscall(SYS_io_uring_enter, ring, 0, 0, IORING_ENTER_GETEVENTS, 0, 0);
            if (atomic_load(cq_head) != atomic_load(cq_tail)) {
                printf("round %u: a completion of nothing\n", round);
                return 1;
            }
            still += (atomic_load(sq_flags) & IORING_SQ_TASKRUN) != 0;
            struct pollfd fd = {ring, POLLIN, 0};
            readable += poll(&fd, 1, 0) != 0;
        }
    }
    printf("%u rounds: with nothing in flight the flag was set %u times, and still after a call %u "
           "times; poll found something %u times\n", round, of_nothing, still, readable);
    return !(of_nothing == ENOUGH && still == of_nothing && readable == 0);
}
C
cc -O2 -pthread -o "$work/try" "$work/try.c"
status=0
timeout 100 "$work/try" || status=$?
if ((status == 124)); then
    echo "not seen in 100 s: the machine may be too busy for two threads that keep their CPUs"
    exit 77
fi
exit "$status"
