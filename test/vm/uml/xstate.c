/*
 * xstate.c -- lets User Mode Linux 6.1 run on a host CPU with AMX.
 *
 * UML keeps a process's extended registers in a buffer of fixed size and writes
 * it back with PTRACE_SETREGSET.  Linux wants the whole XSAVE area there, and with
 * AMX that area is 8 KiB larger than UML's buffer, so the write fails and the
 * guest panics in put_fp_registers.  This library, loaded before UML, completes
 * the buffer with what the host has; guests do not use AMX.
 *
 * uml-run.sh compiles and loads it where it is needed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif

typedef long ptrace_fn(enum __ptrace_request, pid_t, void *, void *);

long ptrace(enum __ptrace_request request, ...)
{
	static ptrace_fn *next;
	static char area[64 << 10]; /* UML traces from one thread; no XSAVE area is this large */
	va_list arguments;
	pid_t pid;
	void *addr, *data;

	va_start(arguments, request);
	pid = va_arg(arguments, pid_t);
	addr = va_arg(arguments, void *);
	data = va_arg(arguments, void *);
	va_end(arguments);
	if (!next)
		next = (ptrace_fn *)dlsym(RTLD_NEXT, "ptrace");
	if (request == PTRACE_SETREGSET && addr == (void *)NT_X86_XSTATE) {
		struct iovec *given = data, whole = {area, sizeof area};

		if (next(PTRACE_GETREGSET, pid, addr, &whole) == 0 && given->iov_len < whole.iov_len) {
			memcpy(area, given->iov_base, given->iov_len);
			return next(request, pid, addr, &whole);
		}
	}
	return next(request, pid, addr, data);
}
