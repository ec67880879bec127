/* Code at privilege level 3. A software KVM runs it on the processor if it is 64-bit code, so the guest
   enters 64-bit mode for it, and leaves it again after. */

.set CODE, 0x08
.set DATA, 0x10
.set CODE64, 0x18
.set USER_DATA, 0x2b
.set USER_CODE64, 0x33
.set TASK, 0x38

.set EFER, 0xc0000080
.set LONG_MODE, 1 << 8
.set CR0_PAGING, 1 << 31
.set CR4_PAE, 1 << 5
.set RFLAGS_RESERVED, 1 << 1
.set INVALID_OPCODE, 6

/* void enter_user(void (*code)(void), unsigned argument): runs 64-bit code at privilege level 3, with the argument
   in rdi and without a stack, until it executes ud2. */
.text
.globl enter_user
enter_user:
    pusha
    mov 36(%esp), %esi
    mov 40(%esp), %edi
    mov %esp, kernel_stack
    sidt kernel_idt

    mov $back_in_kernel, %eax
    mov %ax, invalid_opcode
    shr $16, %eax
    mov %ax, invalid_opcode + 6
    lidt user_idt_pointer
    mov $task, %eax
    mov %ax, task_descriptor + 2
    shr $16, %eax
    mov %al, task_descriptor + 4
    mov %ah, task_descriptor + 7
    andb $~2, task_descriptor + 5   /* not busy with the last time */

    mov %cr4, %eax
    or $CR4_PAE, %eax
    mov %eax, %cr4
    mov $page_tables, %eax
    mov %eax, %cr3
    mov $EFER, %ecx
    mov $LONG_MODE, %eax
    xor %edx, %edx
    wrmsr
    mov %cr0, %eax
    or $CR0_PAGING, %eax
    mov %eax, %cr0
    ljmp $CODE64, $1f

.code64
1:  mov $TASK, %eax
    ltr %ax
    push $USER_DATA
    push $0                         /* no stack */
    push $RFLAGS_RESERVED
    push $USER_CODE64
    push %rsi
    iretq

/* The loop of `count`. */
.globl count_in_user
count_in_user:
    dec %edi
    jnz count_in_user
    ud2                             /* the way back */

/* The exception's frame is left behind. */
back_in_kernel:
    mov $out_of_long_mode, %eax
    ljmp *(%rax)

.code32
leave_long_mode:
    mov %cr0, %eax
    and $~CR0_PAGING, %eax
    mov %eax, %cr0
    mov $EFER, %ecx
    xor %eax, %eax
    xor %edx, %edx
    wrmsr
    mov %cr4, %eax
    and $~CR4_PAE, %eax
    mov %eax, %cr4
    mov $DATA, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov kernel_stack, %esp
    lidt kernel_idt
    popa
    ret

.data
out_of_long_mode:
    .long leave_long_mode
    .word CODE
.balign 8
user_idt:
    .skip 16 * INVALID_OPCODE
invalid_opcode:
    .word 0, CODE64, 0x8e00, 0, 0, 0, 0, 0
user_idt_pointer:
    .word . - user_idt - 1
    .long user_idt
.balign 8
task:
    .long 0, exception_stack, 0     /* the stack of level 0 */
    .skip 0x68 - 12

/* The first four GiB, mapped to themselves for all levels. */
.balign 0x1000
page_tables:
    .long middle + 7, 0
    .balign 0x1000
middle:
    .long bottom + 7, 0, bottom + 0x1007, 0, bottom + 0x2007, 0, bottom + 0x3007, 0
    .balign 0x1000
bottom:
    .set page, 0
    .rept 4 * 512
    .quad page << 21 | 0x87
    .set page, page + 1
    .endr

.bss
.balign 16
    .skip 0x100
exception_stack:
kernel_stack:
    .skip 4
kernel_idt:
    .skip 6
