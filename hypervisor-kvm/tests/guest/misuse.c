/* Drivers of any device that break a rule, or none. */
#include "guest.h"
#include "queue.h"

enum { QUEUES = 2, NEEDS_RESET = 64, TRIES = 1000000 };
enum { ENTROPY = 4, BALLOON = 5 };

static struct queue queues[QUEUES];
static u8 buffer[128] __attribute__((aligned(16)));

/* As a new driver has them. */
static u32 begin(u32 type, u32 queue)
{
    for (u32 n = 0; n < sizeof queues; n++)
        ((u8 *)queues)[n] = 0;
    return bring_up(type, 0, queues, queue + 1);
}

int misuse(u32 type, u32 queue)
{
    u32 at = queue < QUEUES ? begin(type, queue) : 0;
    if (!at)
        return 0;
    queues[queue].available.index = QUEUE + 1;
    barrier();
    set_register(at + NOTIFY, queue);
    for (u32 tries = 0; tries < TRIES; tries++)
        if (get_register(at + STATUS) & NEEDS_RESET)
            return 1;
    return 0;
}

int use(u32 type, u32 queue)
{
    u32 at = queue < QUEUES ? begin(type, queue) : 0, ignored;
    u32 length = sizeof buffer;
    if (!at)
        return 0;
    for (u32 n = 0; n < sizeof buffer; n++)
        buffer[n] = 0;
    /* A list of one page, which nobody uses. */
    if (type == BALLOON) {
        length = 4;
        *(u32 *)buffer = 12288;
    }
    give(at, queue, &queues[queue], 0, buffer, length, type == ENTROPY ? DEVICE_WRITES : 0);
    for (u32 tries = 0; tries < TRIES; tries++)
        if (take(&queues[queue], &ignored, &ignored))
            return 1;
    return 0;
}
