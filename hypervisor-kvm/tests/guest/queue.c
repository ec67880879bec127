/* What drivers of devices do in the same way. */
#include "guest.h"
#include "queue.h"

static u32 find(u32 type)
{
    for (u32 device = 0; device < MOST; device++) {
        u32 at = FIRST + device * DISTANCE;
        if (get_register(at + MAGIC) == 0x74726976 && get_register(at + VERSION) == 2 && get_register(at + DEVICE) == type)
            return at;
    }
    return 0;
}

static void set_address(u32 at, const void *address)
{
    set_register(at, (u32)address);
    set_register(at + 4, 0);
}

u32 bring_up(u32 type, u32 features, struct queue *queues, u32 count)
{
    u32 at = find(type), status = ACKNOWLEDGE | DRIVER;
    if (!at)
        return 0;
    set_register(at + STATUS, 0);
    set_register(at + STATUS, status);
    set_register(at + DRIVER_SELECT, 0);
    set_register(at + DRIVER_FEATURES, features);
    set_register(at + DRIVER_SELECT, 1);
    set_register(at + DRIVER_FEATURES, FEATURE_VERSION_1);
    set_register(at + STATUS, status |= FEATURES_OK);
    for (u32 n = 0; n < count; n++) {
        struct queue *queue = &queues[n];
        set_register(at + QUEUE_SELECT, n);
        set_register(at + QUEUE_SIZE, QUEUE);
        set_address(at + DESCRIPTORS, queue->descriptors);
        set_address(at + AVAILABLE, &queue->available);
        set_address(at + USED, &queue->used);
        queue->available.flags = NO_INTERRUPT;
        set_register(at + QUEUE_READY, 1);
    }
    set_register(at + STATUS, status | DRIVER_OK);
    return at;
}

void give(u32 device, u32 number, struct queue *queue, u32 n, const void *address, u32 length, u16 flags)
{
    queue->descriptors[n].address = (u32)address;
    queue->descriptors[n].length = length;
    queue->descriptors[n].flags = flags;
    queue->available.ring[queue->available.index % QUEUE] = n;
    barrier();
    queue->available.index++;
    barrier();
    set_register(device + NOTIFY, number);
}

int take(struct queue *queue, u32 *n, u32 *length)
{
    if (*(volatile u16 *)&queue->used.index == queue->seen)
        return 0;
    barrier();
    *n = queue->used.ring[queue->seen % QUEUE].id;
    *length = queue->used.ring[queue->seen % QUEUE].length;
    queue->seen++;
    return 1;
}
