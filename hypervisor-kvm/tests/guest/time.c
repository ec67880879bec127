/* The clock that KVM gives its guests (Linux, Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW). */
#include "guest.h"

enum { SYSTEM_TIME = 0x4b564d01, ENABLED = 1 };

static volatile struct {
    u32 version, pad;
    u64 timestamp, system_time;
    u32 multiplier;
    signed char shift;
    u8 flags, more[2];
} page __attribute__((aligned(64)));

static u64 time_stamp(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (u64)high << 32 | low;
}

u64 kvm_clock(void)
{
    u32 version;
    u64 time;
    if (!page.version)
        __asm__ volatile("wrmsr" : : "c"(SYSTEM_TIME), "a"((u32)&page | ENABLED), "d"(0) : "memory");
    do {
        version = page.version;
        barrier();
        u64 since = time_stamp() - page.timestamp;
        since = page.shift < 0 ? since >> -page.shift : since << page.shift;
        time = page.system_time + (since >> 32) * page.multiplier + ((u64)(u32)since * page.multiplier >> 32);
        barrier();
    } while (version & 1 || version != page.version);
    return time;
}
