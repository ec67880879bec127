/* The driver of `storm`: 64-bit code without a stack, in ring 3. Keeps 32 requests under way until as many as asked
   for have ended, and notifies the device where that wants it (virtio 1.2, 2.7.10). */

.set AVAILABLE, 0
.set USED, 8
.set HEADERS, 16
.set STATUSES, 24
.set NOTIFY, 32
.set REQUESTS, 40
.set LAST_BLOCK, 48
.set NOTIFICATIONS, 56
.set FAILURES, 64

.set DEPTH, 32
.set PARTS, 3
.set LAST, 127                      /* of the queue's descriptors */
.set RINGS, 4                       /* after flags and index */
.set AVAILABLE_EVENT, RINGS + 8 * (LAST + 1)

/* rdi: struct storm. r8, r9: the rings. r10: headers. r11: random state. r12: how many were used, r13: made
   available. r14: how many are still to be made available, r15: to be used. rbp: what was available when the device was last
   told. */
.code64
.globl storm64
storm64:
    mov AVAILABLE(%rdi), %r8
    mov USED(%rdi), %r9
    mov HEADERS(%rdi), %r10
    mov $0x9e3779b97f4a7c15, %r11
    xor %r12d, %r12d
    xor %r13d, %r13d
    xor %ebp, %ebp
    mov REQUESTS(%rdi), %r14
    mov %r14, %r15
    xor %ecx, %ecx                  /* the head of the request */
first:
    jmp push_one
first_pushed:
    add $PARTS, %ecx
    cmp $DEPTH * PARTS, %ecx
    jb first
    jmp publish

/* Gives the request with head ecx a random place and makes it available. */
push_one:
    dec %r14
    mov $6364136223846793005, %rax
    imul %rax, %r11
    mov $1442695040888963407, %rax
    add %rax, %r11
    mov %r11, %rax
    shr $33, %rax
    and LAST_BLOCK(%rdi), %rax
    shl $3, %rax                    /* in sectors */
    mov %ecx, %edx
    shl $4, %edx
    mov %rax, 8(%r10, %rdx)
    mov %r13d, %eax
    and $LAST, %eax
    mov %cx, RINGS(%r8, %rax, 2)
    inc %r13d
    cmp $DEPTH, %r13d
    jbe pushed_at_first
    jmp take
pushed_at_first:
    jmp first_pushed

/* What is used and not seen. */
poll:
    pause
    cmp %r12w, 2(%r9)
    je poll
take:
    cmp %r12w, 2(%r9)
    je publish
    mov %r12d, %eax
    and $LAST, %eax
    mov RINGS(%r9, %rax, 8), %ecx
    mov STATUSES(%rdi), %rdx
    movzbl (%rdx, %rcx), %edx
    add %rdx, FAILURES(%rdi)
    inc %r12d
    dec %r15
    test %r14, %r14
    jnz push_one
    jmp take

/* Shows the device what was made available, and tells it if it waits for one of these. */
publish:
    cmp %ebp, %r13d
    je published
    mov %r13w, 2(%r8)
    mfence
    mov %r13d, %eax
    sub AVAILABLE_EVENT(%r9), %ax
    dec %ax
    mov %r13d, %edx
    sub %ebp, %edx
    mov %r13d, %ebp
    cmp %dx, %ax
    jae published
    incq NOTIFICATIONS(%rdi)
    mov NOTIFY(%rdi), %rax
    movl $0, (%rax)
published:
    test %r15, %r15
    jnz poll
    ud2                             /* the way back */
