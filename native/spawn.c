/* Starting a program that must not outlive us and must not have anything of ours. */
#define _GNU_SOURCE
#include "vb_native.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* glibc has a wrapper only since 2.34. */
static int close_from(unsigned int first)
{
	return (int)syscall(SYS_close_range, first, ~0U, 0U);
}

/* In the child, which has our memory but not our descriptors and signal handlers. All signals are
 * blocked: a handler of ours would run in our memory. */
static int become(char *const argv[], char *const environment[], int output, pid_t parent)
{
	sigset_t none;
	int nothing;

	for (int number = 1; number < NSIG; number++)
		signal(number, SIG_DFL);
	setsid();
	if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
		return errno;
	if (getppid() != parent)
		return ESRCH;
	nothing = open("/dev/null", O_RDONLY | O_CLOEXEC);
	if (nothing < 0 || dup2(nothing, 0) < 0 || dup2(output, 1) < 0 || dup2(output, 2) < 0)
		return errno;
	if (close_from(3) < 0)
		return errno;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	execvpe(argv[0], argv, environment);
	return errno;
}

/* The kernel kills the program when the thread that calls this ends: call it in the main one. */
int64_t vb_spawn(char *const argv[], char *const environment[], int output)
{
	sigset_t all, before;
	pid_t parent = getpid(), pid;
	volatile int error = 0;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pid = vfork();
	if (pid == 0) {
		error = become(argv, environment, output, parent);
		_exit(127);
	}
	if (pid < 0)
		error = errno;
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (pid > 0 && error) {
		/* Nobody else waits for it. */
		siginfo_t end;

		waitid(P_PID, (id_t)pid, &end, WEXITED);
	}
	return error ? -(int64_t)error : pid;
}
