/* A driver of a network device whose buffers are next to nothing in as many pieces as there can be, each of which is looked at
   again for every frame that they have no room for. */
#include "virtio.h"

enum { TYPE = 1, QUEUE = 256, INDIRECT = 4, HEADER = 12, FEATURE_MERGE = 1 << 15, FEATURE_INDIRECT = 1 << 28 };

static struct descriptor descriptors[QUEUE] __attribute__((aligned(16))), table[QUEUE] __attribute__((aligned(16)));
static struct { u16 flags, index, ring[QUEUE]; } available;
static struct { u16 flags, index; struct { u32 id, length; } ring[QUEUE]; } used __attribute__((aligned(4)));
static u8 header[HEADER];

int flood(void)
{
    u32 at = FIRST;
    while (at < FIRST + MOST * DISTANCE && get_register(at + DEVICE) != TYPE)
        at += DISTANCE;
    for (u32 n = 0; n < QUEUE; n++) {
        table[n].address = (u32)header;
        table[n].flags = DEVICE_WRITES | (n < QUEUE - 1 ? NEXT : 0);
        table[n].next = n + 1;
        descriptors[n].address = (u32)table;
        descriptors[n].length = sizeof table;
        descriptors[n].flags = INDIRECT;
        available.ring[n] = n;
    }
    /* The first has to have room for a header. */
    descriptors[0].address = (u32)header;
    descriptors[0].length = sizeof header;
    descriptors[0].flags = DEVICE_WRITES;
    available.flags = NO_INTERRUPT;
    available.index = QUEUE;
    if (!start_disk(at, FEATURE_MERGE | FEATURE_INDIRECT, QUEUE, descriptors, &available, &used))
        return 0;
    set_register(at + NOTIFY, 0);
    return 1;
}
