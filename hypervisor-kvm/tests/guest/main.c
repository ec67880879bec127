/* A guest that obeys one-line commands on the serial port: the protocol of the conformance suite in
   instance-core, `user TURNS` and `kernel TURNS`, which count in ring 3 and in ring 0, `clock`, `astray`,
   `storm DISK read|write REQUESTS`, which is answered by `notified TIMES`, `chatter`, after which it says the
   same for ever, and what the tests of single devices ask for. */
#include "guest.h"

enum { SERIAL = 0x3f8, DATA = 0, INTERRUPTS = 1, FIFO = 2, LINE = 3, MODEM = 4, LINE_STATUS = 5 };
enum { RECEIVED = 0x01, CAN_SEND = 0x20 };
enum { PM1_STATUS = 0x600, PM1_ENABLE = 0x602, PM1_CONTROL = 0x604, POWER_BUTTON = 1 << 8 };
enum { PANIC = 0x505, PANICKED = 1, RTC = 0x70 };
enum { PIC = 0x20, PIC2 = 0xa0, VECTORS = 0x20, IRQS = 16 };

static const struct start_info *info;
static u8 sector[SECTOR] __attribute__((aligned(16)));

/* The 16550. */

static void put(char c)
{
    while (!(inb(SERIAL + LINE_STATUS) & CAN_SEND))
        ;
    outb(SERIAL + DATA, c);
}

static void say(const char *text)
{
    while (*text)
        put(*text++);
}

/* In pieces of 16 bits, so that no division is of 64. */
static void say_number(u64 number)
{
    char digits[21];
    char *at = digits + sizeof digits;
    *--at = 0;
    do {
        u32 rest = 0;
        u64 quotient = 0;
        for (int shift = 48; shift >= 0; shift -= 16) {
            u32 piece = rest << 16 | (u32)(number >> shift & 0xffff);
            quotient |= (u64)(piece / 10) << shift;
            rest = piece % 10;
        }
        *--at = '0' + rest;
        number = quotient;
    } while (number);
    say(at);
}

static void answer_number(const char *what, u64 number)
{
    say(what);
    say_number(number);
    say("\n");
}

/* Power. */

static void stop(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

static void power_off(void)
{
    outw(PM1_CONTROL, 5 << 10 | 1 << 13);
    stop();
}

static void reset(void)
{
    /* By the keyboard controller, as a PC's kernel does it that is told to: once it takes a command. */
    while (inb(0x64) & 2)
        ;
    outb(0x64, 0xfe);
    stop();
}

/* An exception without a handler, without a handler for that: a triple fault. */
static void crash(void)
{
    struct { u16 limit; u32 base; } __attribute__((packed)) none = { 0, 0 };
    __asm__ volatile("lidt %0; ud2" : : "m"(none));
}

/* Code where there is no memory, which nobody can run. */
static void go_astray(void)
{
    ((void (*)(void))0xc0001000)();
}

/* Says by pvpanic that it panicked. Where the guest is still there, nobody has heard it. */
static void panic(void)
{
    outb(PANIC, inb(PANIC) & PANICKED);
    say("unsupported\n");
}

static u32 clock(u8 which)
{
    outb(RTC, which);
    u8 digits = inb(RTC + 1);
    return (digits >> 4) * 10 + (digits & 15);
}

/* Century, year, month, day, hour, minute and second, two digits each. */
static u64 time(void)
{
    static const u8 order[] = { 0x32, 9, 8, 7, 4, 2, 0 };
    u64 number;
    u32 second;
    do {
        number = 0;
        second = clock(0);
        for (u32 n = 0; n < sizeof order; n++)
            number = number * 100 + clock(order[n]);
    } while (second != clock(0));
    return number;
}

/* Interrupts: of the serial port (4), of ACPI (9), which comes by the second controller (2). */

static struct { u16 low, selector, type, high; } idt[VECTORS + IRQS];

static void enable_interrupts(void)
{
    for (u32 n = VECTORS; n < VECTORS + IRQS; n++) {
        idt[n].low = (u32)interrupt;
        idt[n].selector = 8;
        idt[n].type = 0x8e00;
        idt[n].high = (u32)interrupt >> 16;
    }
    struct { u16 limit; u32 base; } __attribute__((packed)) pointer = { sizeof idt - 1, (u32)idt };
    __asm__ volatile("lidt %0" : : "m"(pointer));

    outb(PIC, 0x11);
    outb(PIC + 1, VECTORS);
    outb(PIC + 1, 1 << 2);
    outb(PIC + 1, 1);
    outb(PIC2, 0x11);
    outb(PIC2 + 1, VECTORS + 8);
    outb(PIC2 + 1, 2);
    outb(PIC2 + 1, 1);
    outb(PIC + 1, (u8)~(1 << 4 | 1 << 2));
    outb(PIC2 + 1, (u8)~(1 << 1));

    outb(SERIAL + LINE, 3);
    outb(SERIAL + FIFO, 1);
    outb(SERIAL + MODEM, 0x0b);
    outb(SERIAL + INTERRUPTS, RECEIVED);
    outw(PM1_ENABLE, POWER_BUTTON);
}

/* The next byte typed. The power button is heeded meanwhile, and the network. */
static char get(void)
{
    for (;;) {
        if (inw(PM1_STATUS) & POWER_BUTTON)
            power_off();
        if (inb(SERIAL + LINE_STATUS) & RECEIVED)
            return inb(SERIAL + DATA);
        if (!(serve_nets() | serve_vsock() | serve_console()))
            wait_for_interrupt();
    }
}

static void get_line(char *line, u32 room)
{
    u32 length = 0;
    for (char c; (c = get()) != '\n';)
        if (c != '\r' && length < room - 1)
            line[length++] = c;
    line[length] = 0;
}

/* Commands. */

/* Takes the next word off the line; it is empty at the end. */
static char *word(char **line)
{
    char *start = *line;
    while (*start == ' ')
        start++;
    char *end = start;
    while (*end && *end != ' ')
        end++;
    *line = *end ? end + 1 : end;
    *end = 0;
    return start;
}

static u32 number(char **line)
{
    u32 value = 0;
    for (const char *digit = word(line); *digit >= '0' && *digit <= '9'; digit++)
        value = value * 10 + (*digit - '0');
    return value;
}

int is(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static u32 memory_mib(void)
{
    struct { u64 address, size; u32 type, reserved; } const *entry = (void *)(u32)info->memory_map;
    u64 bytes = 0;
    for (u32 n = 0; n < info->memory_map_entries; n++)
        if (entry[n].type == 1)
            bytes += entry[n].size;
    return bytes >> 20;
}

static void do_size(u32 disk)
{
    u64 size = disk_size(disk);
    if (size)
        answer_number("size ", size);
    else
        say("error\n");
}

/* What a request for data brought, as text. */
static void do_read(const char *what, u32 disk, enum request type, u32 at, u32 length)
{
    if (!disk_request(disk, type, at, sector, length)) {
        say("error\n");
        return;
    }
    say(what);
    for (u32 n = 0; n < length && sector[n]; n++)
        put(sector[n]);
    say("\n");
}

static void do_write(u32 disk, u32 at, const char *text)
{
    for (u32 n = 0; n < SECTOR; n++)
        sector[n] = *text ? *text++ : 0;
    say(disk_request(disk, WRITE, at, sector, SECTOR) ? "wrote\n" : "error\n");
}

static void do_break(u32 disk, const char *rule)
{
    static const char *const rules[RULES] = { "loop", "outside", "index", "short", "live" };
    for (u32 n = 0; n < RULES; n++)
        if (is(rule, rules[n]))
            say(break_disk(disk, n) ? "broken\n" : "whole\n");
}

static char remembered[64];

static void remember(const char *text)
{
    u32 n = 0;
    for (; text[n] && n < sizeof remembered - 1; n++)
        remembered[n] = text[n];
    remembered[n] = 0;
}

static void do_storm(u32 disk, enum request type, u32 requests)
{
    u32 notifications;
    if (storm_disk(disk, type, requests, &notifications))
        answer_number("notified ", notifications);
    else
        say("error\n");
}

static void do_mac(u32 net)
{
    u8 mac[6];
    if (!net_mac(net, mac)) {
        say("error\n");
        return;
    }
    say("mac ");
    for (u32 n = 0; n < 6; n++) {
        if (n)
            put(':');
        put("0123456789abcdef"[mac[n] >> 4]);
        put("0123456789abcdef"[mac[n] & 15]);
    }
    say("\n");
}

/* An address is four numbers with points between them. */
static void do_up(u32 net, char *text)
{
    u8 address[4] = { 0 };
    for (u32 n = 0; *text && n < 4; text++) {
        if (*text == '.')
            n++;
        else
            address[n] = address[n] * 10 + (*text - '0');
    }
    say(net_up(net, address) ? "up\n" : "error\n");
}

static void obey(char *line)
{
    const char *command = word(&line);
    if (is(command, "ping")) {
        say("pong ");
        say(word(&line));
        say("\n");
    } else if (is(command, "cpus")) {
        answer_number("cpus ", count_cpus(info));
    } else if (is(command, "memory")) {
        answer_number("memory ", memory_mib());
    } else if (is(command, "remember")) {
        remember(word(&line));
        say("remembered\n");
    } else if (is(command, "recall")) {
        say("recalled ");
        say(remembered);
        say("\n");
    } else if (is(command, "dmi")) {
        say("dmi ");
        say_smbios_field(word(&line), put);
        say("\n");
    } else if (is(command, "disks")) {
        answer_number("disks ", count_disks());
    } else if (is(command, "size")) {
        do_size(number(&line));
    } else if (is(command, "serial")) {
        do_read("serial ", number(&line), GET_ID, 0, SERIAL_MAX);
    } else if (is(command, "read")) {
        u32 disk = number(&line);
        do_read("data ", disk, READ, number(&line), SECTOR);
    } else if (is(command, "write")) {
        u32 disk = number(&line), at = number(&line);
        do_write(disk, at, word(&line));
    } else if (is(command, "flush")) {
        say(disk_request(number(&line), FLUSH, 0, 0, 0) ? "flushed\n" : "error\n");
    } else if (is(command, "break")) {
        u32 disk = number(&line);
        do_break(disk, word(&line));
    } else if (is(command, "forget")) {
        forget_disk(number(&line));
        say("forgot\n");
    } else if (is(command, "misuse")) {
        u32 type = number(&line);
        say(misuse(type, number(&line)) ? "broken\n" : "whole\n");
    } else if (is(command, "use")) {
        u32 type = number(&line);
        say(use(type, number(&line)) ? "used\n" : "stuck\n");
    } else if (is(command, "storm")) {
        u32 disk = number(&line);
        enum request type = is(word(&line), "write") ? WRITE : READ;
        do_storm(disk, type, number(&line));
    } else if (is(command, "nets")) {
        answer_number("nets ", count_nets());
    } else if (is(command, "mac")) {
        do_mac(number(&line));
    } else if (is(command, "mtu")) {
        answer_number("mtu ", net_mtu(number(&line)));
    } else if (is(command, "up")) {
        u32 net = number(&line);
        do_up(net, word(&line));
    } else if (is(command, "poweroff")) {
        power_off();
    } else if (is(command, "reboot")) {
        reset();
    } else if (is(command, "crash")) {
        crash();
    } else if (is(command, "panic")) {
        panic();
    } else if (is(command, "astray")) {
        go_astray();
    } else if (is(command, "clock")) {
        answer_number("clock ", time());
    } else if (is(command, "kvmclock")) {
        answer_number("kvmclock ", kvm_clock());
    } else if (is(command, "cid")) {
        answer_number("cid ", vsock_up());
    } else if (is(command, "terminal")) {
        u32 size = console_size();
        answer_number("terminal ", (size & 0xffff) * 1000 + (size >> 16));
    } else if (is(command, "connect")) {
        answer_number("connect ", vsock_connect(number(&line)));
    } else if (is(command, "target")) {
        answer_number("target ", balloon_target());
    } else if (is(command, "touch")) {
        u32 first = number(&line), count = number(&line), sum = 0;
        for (u32 page = first; page < first + count; page++) {
            sum += load(page << 12);
            store(page << 12, 1);
        }
        answer_number("touch ", sum);
    } else if (is(command, "inflate")) {
        u32 first = number(&line);
        inflate(first, number(&line));
        say("inflate 1\n");
    } else if (is(command, "report")) {
        u32 first = number(&line);
        report(first, number(&line));
        say("report 1\n");
    } else if (is(command, "long")) {
        u32 pages = number(&line);
        prepare_list(pages);
        say("begun\n");
        inflate_list(pages);
        say("long 1\n");
    } else if (is(command, "hoard")) {
        prepare_hoard();
        say("hoarding\n");
        hoard();
    } else if (is(command, "flood")) {
        say(flood() ? "flooding\n" : "error\n");
    } else if (is(command, "spin")) {
        say("spinning\n");
        for (;;)
            __asm__ volatile("");
    } else if (is(command, "chatter")) {
        for (;;)
            say("chatter\n");
    } else if (is(command, "kernel")) {
        count(number(&line));
        say("kernel done\n");
    } else if (is(command, "user")) {
        enter_user(count_in_user, number(&line));
        say("user done\n");
    } else {
        say("unknown\n");
    }
}

void guest_main(const struct start_info *start_info)
{
    static char line[1024];
    info = start_info;
    enable_interrupts();
    say("GUEST READY\n");
    for (;;) {
        get_line(line, sizeof line);
        obey(line);
    }
}
