/* A driver of the memory balloon that puts in what it is told to. */
#include "guest.h"
#include "queue.h"

enum { TYPE = 5, FEATURE_REPORTING = 1 << 5, INFLATE = 0, REPORT = 2, QUEUES = 3, TARGET = 0, ACTUAL = 4, LIST = 256 };

static struct queue queues[QUEUES];
static u32 device, actual, list[LIST];

/* Where a long list is, and the pages that it names, of which no two adjoin: beyond all else. */
enum { LONG = 16 << 20, LENGTH = 1 << 18, FAR = 32 << 8, SPREAD = 4096 };

u32 balloon_target(void)
{
    if (!device)
        device = bring_up(TYPE, FEATURE_REPORTING, queues, QUEUES);
    return device ? get_register(device + CONFIG + TARGET) : 0;
}

void inflate(u32 first, u32 count)
{
    u32 ignored;
    balloon_target();
    for (u32 done = 0; device && done < count; done += LIST) {
        u32 now = count - done < LIST ? count - done : LIST;
        for (u32 n = 0; n < now; n++)
            list[n] = first + done + n;
        give(device, INFLATE, &queues[INFLATE], 0, list, now * sizeof list[0], 0);
        while (!take(&queues[INFLATE], &ignored, &ignored))
            ;
        actual += now;
        set_register(device + CONFIG + ACTUAL, actual);
    }
}

void report(u32 first, u32 count)
{
    u32 ignored;
    balloon_target();
    give(device, REPORT, &queues[REPORT], 0, (void *)(first << 12), count << 12, DEVICE_WRITES);
    while (!take(&queues[REPORT], &ignored, &ignored))
        ;
}

void prepare_list(u32 count)
{
    balloon_target();
    for (u32 n = 0; n < count; n++)
        ((u32 *)LONG)[n] = FAR + n % SPREAD * 2;
}

void inflate_list(u32 count)
{
    u32 ignored;
    give(device, INFLATE, &queues[INFLATE], 0, (void *)LONG, count * sizeof(u32), 0);
    while (!take(&queues[INFLATE], &ignored, &ignored))
        ;
}

void prepare_hoard(void)
{
    prepare_list(LENGTH);
}

void hoard(void)
{
    while (device)
        give(device, INFLATE, &queues[INFLATE], 0, (void *)LONG, LENGTH * sizeof(u32), 0);
}
