/* Where the guest begins, and what C cannot say. The emulator of a software KVM knows no `iret` to
   protected mode, so nothing here returns from an interrupt. */

.set CODE, 0x08
.set DATA, 0x10

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
.globl task_descriptor
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        /* 0x08: code */
    .quad 0x00cf93000000ffff        /* 0x10: data */
    .quad 0x00af9b000000ffff        /* 0x18: 64-bit code; this and the rest for user.S */
    .quad 0
    .quad 0x00cff3000000ffff        /* 0x28: data of level 3 */
    .quad 0x00affb000000ffff        /* 0x30: 64-bit code of level 3 */
task_descriptor:
    .quad 0x0000890000000067, 0     /* 0x38: task state; user.S adds its place */
gdt_pointer:
    .word . - gdt - 1
    .long gdt

.bss
.balign 16
    .skip 0x4000
stack_top:
waiting_stack:
    .skip 4
