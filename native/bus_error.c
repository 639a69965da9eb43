#define _GNU_SOURCE
#include "bus_error.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

static _Thread_local sigjmp_buf *memory_gone;
static struct sigaction handler_before;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
	if (memory_gone)
		siglongjmp(*memory_gone, 1);
	if (handler_before.sa_flags & SA_SIGINFO)
		handler_before.sa_sigaction(number, info, context);
	else if (handler_before.sa_handler != SIG_DFL && handler_before.sa_handler != SIG_IGN)
		handler_before.sa_handler(number);
	else
		signal(number, SIG_DFL);
}

static void install_handler(void)
{
	struct sigaction action = {
		.sa_sigaction = on_bus_error,
		.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK,
	};

	sigaction(SIGBUS, &action, &handler_before);
}

void catch_bus_errors(void)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	pthread_once(&once, install_handler);
}

bool survives(void (*work)(void *argument), void *argument)
{
	sigjmp_buf place;
	bool whole;

	memory_gone = &place;
	whole = sigsetjmp(place, 0) == 0;
	if (whole)
		work(argument);
	memory_gone = NULL;
	return whole;
}
