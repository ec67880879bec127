/* Starts the other processors and counts those that answer. */
#include "guest.h"

enum { LOCAL_APIC = 0xfee00000, APIC_ID = 0x20, ICR_LOW = 0x300, ICR_HIGH = 0x310 };
enum { INIT = 0x4500, STARTUP = 0x4600 };
/* The page that the others start in; the machine puts nothing there. */
enum { TRAMPOLINE = 0x10000 };
enum { WITHOUT_ACPI = 16 };

static void send(u32 apic, u32 command)
{
    store(LOCAL_APIC + ICR_HIGH, apic << 24);
    store(LOCAL_APIC + ICR_LOW, command);
}

static u32 start(u32 apic)
{
    if (apic == load(LOCAL_APIC + APIC_ID) >> 24)
        return 0;
    send(apic, INIT);
    send(apic, STARTUP | TRAMPOLINE >> 12);
    return 1;
}

static u32 u32_at(u32 address) { return *(const u32 *)address; }

/* The address of the MADT, or 0. */
static u32 find_madt(u32 rsdp)
{
    if (!rsdp)
        return 0;
    u32 extended = *(const u8 *)(rsdp + 15) >= 2;
    u32 list = u32_at(rsdp + (extended ? 24 : 16)), width = extended ? 8 : 4;
    for (u32 at = list + 36; at < list + u32_at(list + 4); at += width) {
        u32 table = u32_at(at);
        if (u32_at(table) == 0x43495041) /* "APIC" */
            return table;
    }
    return 0;
}

/* Starts every processor that the MADT names as enabled. */
static u32 start_all(u32 madt)
{
    u32 started = 0, end = madt + u32_at(madt + 4);
    for (u32 at = madt + 44; at < end; at += *(const u8 *)(at + 1)) {
        if (*(const u8 *)at == 0 && u32_at(at + 4) & 1)
            started += start(*(const u8 *)(at + 3));
    }
    return started;
}

/* Port 0x61 toggles a bit every 15 us: waits until `expected` have answered, for a second at most after each. */
static u32 await(volatile u16 *answered, u32 expected)
{
    u8 last = inb(0x61) & 0x10;
    u32 seen = 0;
    for (u32 ticks = 0; ticks < 66000 && *answered < expected;) {
        u8 now = inb(0x61) & 0x10;
        ticks = *answered == seen ? ticks + (now != last) : 0;
        seen = *answered;
        last = now;
    }
    return *answered;
}

u32 count_cpus(const struct start_info *info)
{
    for (u8 *from = trampoline, *to = (u8 *)TRAMPOLINE; from < trampoline_end;)
        *to++ = *from++;
    volatile u16 *answered = (volatile u16 *)(TRAMPOLINE + (trampoline_counter - trampoline));
    u32 madt = find_madt(info->rsdp), expected = 0;
    if (madt)
        expected = start_all(madt);
    else
        for (u32 apic = 0; apic < WITHOUT_ACPI; apic++)
            expected += start(apic);
    return 1 + await(answered, expected);
}
