/*
 * The same sections in C with liburcu-memb, whose reader's side is inlined and whose thread-local data is a program's own: at its best.
 *
 *   urcu sections READERS COUNT    nanoseconds per section, of the slowest reader
 *   urcu wait READERS ROUNDS       nanoseconds that synchronize_rcu() takes beside readers that are always busy: median, 99 %
 */
#define _GNU_SOURCE
#define _LGPL_SOURCE
#define RCU_MEMB
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <urcu/urcu-memb.h>

#define READERS_MAX 64

typedef uint64_t (*device_fn)(uint64_t);

static uint64_t empty(uint64_t request) { return request; }

static device_fn volatile chosen = empty;
static device_fn device;
static pthread_barrier_t barrier;
static volatile int stop;
static uint64_t count;
static double times[READERS_MAX];

static double now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e9 + time.tv_nsec;
}

static void sections(uint64_t how_many)
{
	for (uint64_t request = 0; request < how_many; request++) {
		urcu_memb_read_lock();
		rcu_dereference(device)(request);
		urcu_memb_read_unlock();
	}
}

static void *timed(void *place)
{
	urcu_memb_register_thread();
	pthread_barrier_wait(&barrier);
	double started = now_ns();
	sections(count);
	*(double *)place = (now_ns() - started) / count;
	urcu_memb_unregister_thread();
	return NULL;
}

static void *busy(void *unused)
{
	urcu_memb_register_thread();
	pthread_barrier_wait(&barrier);
	while (!stop)
		sections(100);
	urcu_memb_unregister_thread();
	return unused;
}

static int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static void wait_for_readers(void)
{
	double *waits = calloc(count, sizeof *waits);

	if (!waits)
		exit(1);
	pthread_barrier_wait(&barrier);
	for (uint64_t round = 0; round < count; round++) {
		usleep(50);
		double started = now_ns();
		urcu_memb_synchronize_rcu();
		waits[round] = now_ns() - started;
	}
	stop = 1;
	qsort(waits, count, sizeof *waits, ascending);
	printf("%f %f\n", waits[count / 2], waits[count * 99 / 100]);
	free(waits);
}

int main(int argc, char **argv)
{
	pthread_t threads[READERS_MAX];
	int readers = argc == 4 ? atoi(argv[2]) : -1;
	double slowest = 0;

	if (readers < 0 || readers > READERS_MAX)
		return 2;
	int is_wait = !strcmp(argv[1], "wait");
	count = strtoull(argv[3], NULL, 10);
	device = chosen;
	pthread_barrier_init(&barrier, NULL, readers + is_wait);
	for (int i = 0; i < readers; i++)
		pthread_create(&threads[i], NULL, is_wait ? busy : timed, &times[i]);
	if (is_wait)
		wait_for_readers();
	for (int i = 0; i < readers; i++) {
		pthread_join(threads[i], NULL);
		slowest = times[i] > slowest ? times[i] : slowest;
	}
	if (!is_wait)
		printf("%f\n", slowest);
	return 0;
}
