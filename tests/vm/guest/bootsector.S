/*
 * A guest in 512 bytes: through its firmware's virtio-blk driver it reads 16 KiB at a time from
 * sector FROM on, inverts some bits, writes that from sector TO on, reads it back and compares.
 * On its debug port it says S when it starts, a point after each piece, and D when all COUNT are
 * done, or F at the first failure.
 */
	.code16
	.set SOURCE, 0x1000 /* segments */
	.set SECOND, 0x2000
	.set WORDS, 0x2000

	.globl _start
_start:	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %ss
	movw	$0x7c00, %sp
	cld
	movb	%dl, drive
	movb	$'S', %al
	outb	%al, $0xe9
next:	movw	$from, %si
	movb	$0x42, %ah
	call	disk
	movw	$SOURCE, %ax
	movw	%ax, %es
	xorw	%di, %di
	movw	$WORDS, %cx
1:	xorw	$0x5a5a, %es:(%di)
	addw	$2, %di
	loop	1b
	movw	$to, %si
	movb	$0x43, %ah
	call	disk
	movw	$again, %si
	movb	$0x42, %ah
	call	disk
	movw	$SECOND, %ax
	movw	%ax, %es
	movw	$SOURCE, %ax
	movw	%ax, %ds
	xorw	%si, %si
	xorw	%di, %di
	movw	$WORDS, %cx
	repe	cmpsw
	movw	$0, %ax
	movw	%ax, %ds
	jne	fail
	addl	$32, from + 8
	addl	$32, to + 8
	addl	$32, again + 8
	movb	$'.', %al
	outb	%al, $0xe9
	decw	left
	jnz	next
	movb	$'D', %al
	jmp	say
disk:	xorb	%al, %al
	movb	drive, %dl
	int	$0x13
	jc	fail
	ret
fail:	movb	$'F', %al
say:	outb	%al, $0xe9
halt:	hlt
	jmp	halt

drive:	.byte	0
left:	.word	COUNT
	.balign	4
from:	.byte	16, 0
	.word	32, 0, SOURCE
	.quad	FROM
to:	.byte	16, 0
	.word	32, 0, SOURCE
	.quad	TO
again:	.byte	16, 0
	.word	32, 0, SECOND
	.quad	TO
	.org	510
	.byte	0x55, 0xaa
