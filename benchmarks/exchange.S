/*
 * A guest that does nothing but exchange frames, in place of a firmware: whenever GO is set it
 * offers room for DEPTH frames, sends DEPTH, looks until all have come back, and counts that in
 * ROUNDS. The rings, and what the device was told of them, are the work of ``qtest_net``.
 */
	.set GO, 0x1000
	.set DEPTH, 0x1004
	.set ROUNDS, 0x1008
	.set POSTED, 0x100c /* frames so far */
	.set DEVICE, 0x1010 /* where its registers are */
	.set NOTIFY, 0x50
	.set RING, 256
	.set RECEIVE, 0x1000000
	.set SEND, RECEIVE + 0x4000
	.set AVAILABLE, 0x1000 + 2 /* the rings' indices */
	.set USED, 0x2000 + 2

	.code32
	.globl _start
_start:
table:	.quad	0, 0x00cf9a000000ffff, 0x00cf92000000ffff /* code and data: all 4 GiB */
pointer: .word	. - table - 1
	.long	table

wait:	cmpl	$0, GO
	je	wait
	movl	DEVICE, %ebx
	movl	DEPTH, %ecx
	movl	POSTED, %edx
again:	leal	RING(%edx), %eax
	movw	%ax, RECEIVE + AVAILABLE
	movl	$0, NOTIFY(%ebx)
	addl	%ecx, %edx
	movw	%dx, SEND + AVAILABLE
	movl	$1, NOTIFY(%ebx)
look:	cmpw	%dx, SEND + USED
	jne	look
	cmpw	%dx, RECEIVE + USED
	jne	look
	movl	%edx, POSTED
	incl	ROUNDS
	cmpl	$0, GO
	jne	again
	jmp	wait

start:	movw	$16, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	jmp	wait

	.code16
begin:	cli
	lgdtl	%cs:pointer - _start
	movl	%cr0, %eax
	orb	$1, %al
	movl	%eax, %cr0
	ljmpl	$8, $start

	.org	0xfff0
	jmp	begin /* where the processor begins */
	.org	0x10000, 0x90
