/* Where the guest begins, and what C cannot say. The emulator of a software KVM knows no `iret` to
   protected mode, so nothing here returns from an interrupt. */

.set CODE, 0x08
.set DATA, 0x10
.set USER_CODE, 0x18
.set USER_DATA, 0x20

/* XEN_ELFNOTE_PHYS32_ENTRY: name and contents of four bytes each. */
.section .note.pvh, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long entry

.text
.globl entry
entry:
    /* The first sign of life, before anything that could fail. */
    mov $0x3f8, %dx
    mov $'\n', %al
    out %al, %dx

    cld
    mov $stack_top, %esp
    lgdt gdt_pointer
    ljmp $CODE, $1f
1:  mov $DATA, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    push %ebx
    call guest_main
2:  cli
    hlt
    jmp 2b

/* void wait_for_interrupt(void): enables interrupts until one arrives. */
.globl wait_for_interrupt
wait_for_interrupt:
    mov %esp, waiting_stack
    sti
    hlt
    cli
    ret

/* Every interrupt ends here. They are enabled in `wait_for_interrupt` alone, so the place that was
   interrupted is known, and is returned from. */
.globl interrupt
interrupt:
    mov waiting_stack, %esp
    mov $0x20, %al
    out %al, $0xa0
    out %al, $0x20
    ret

/* void count(unsigned turns): the loop that `user` and `kernel` run. */
.globl count
count:
    mov 4(%esp), %ecx
1:  dec %ecx
    jnz 1b
    ret

/* void enter_user(unsigned turns): the same loop at privilege level 3. */
.globl enter_user
enter_user:
    pusha
    mov 36(%esp), %esi
    mov %esp, kernel_stack
    mov $0x174, %ecx                /* IA32_SYSENTER_CS, ESP, EIP */
    mov $CODE, %eax
    xor %edx, %edx
    wrmsr
    inc %ecx
    mov %esp, %eax
    wrmsr
    inc %ecx
    mov $back_in_kernel, %eax
    wrmsr
    mov $in_user, %edx
    mov $user_stack_top, %ecx
    sysexit
in_user:
    push %esi
    call count
    sysenter
back_in_kernel:
    mov $DATA, %ax                  /* sysexit left the user's */
    mov %ax, %ds
    mov %ax, %es
    mov kernel_stack, %esp
    popa
    ret

/* What an application processor runs first, in real mode, at a page below 1 MiB that the code is
   copied to: it counts itself and stops. */
.globl trampoline, trampoline_end, trampoline_counter
.code16
trampoline:
    lock incw %cs:(trampoline_counter - trampoline)
1:  cli
    hlt
    jmp 1b
.balign 2
trampoline_counter:
    .word 0
trampoline_end:
.code32

.data
.balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cffb000000ffff
    .quad 0x00cff3000000ffff
gdt_pointer:
    .word . - gdt - 1
    .long gdt

.bss
.balign 16
    .skip 0x4000
stack_top:
    .skip 0x400
user_stack_top:
waiting_stack:
    .skip 4
kernel_stack:
    .skip 4
