/* A driver of virtio block devices: one request at a time, waited for by asking. */
#include "virtio.h"

enum { QUEUE = 4 };

struct queue {
    struct descriptor descriptors[QUEUE];
    struct { u16 flags, index, ring[QUEUE]; } available;
    struct { u16 flags, index; struct { u32 id, length; } ring[QUEUE]; } used __attribute__((aligned(4)));
    u32 ready;
} __attribute__((aligned(16)));

static struct queue queues[MOST];

u32 count_disks(void)
{
    u32 disks = 0;
    while (disks < MOST && is_disk(base(disks)))
        disks++;
    return disks;
}

static void set_address(u32 at, const void *address)
{
    set_register(at, (u32)address);
    set_register(at + 4, 0);
}

int start_disk(u32 at, u32 features, u32 size, const void *descriptors, const void *available, const void *used)
{
    u32 status = ACKNOWLEDGE | DRIVER;
    set_register(at + STATUS, 0);
    set_register(at + STATUS, status);
    set_register(at + DEVICE_SELECT, 0);
    set_register(at + DRIVER_SELECT, 0);
    set_register(at + DRIVER_FEATURES, get_register(at + DEVICE_FEATURES) & features);
    set_register(at + DRIVER_SELECT, 1);
    set_register(at + DRIVER_FEATURES, FEATURE_VERSION_1);
    set_register(at + STATUS, status |= FEATURES_OK);
    if (!(get_register(at + STATUS) & FEATURES_OK))
        return 0;
    set_register(at + QUEUE_SELECT, 0);
    set_register(at + QUEUE_SIZE, size);
    set_address(at + DESCRIPTORS, descriptors);
    set_address(at + AVAILABLE, available);
    set_address(at + USED, used);
    set_register(at + QUEUE_READY, 1);
    set_register(at + STATUS, status | DRIVER_OK);
    return 1;
}

static int set_up(u32 at, struct queue *queue)
{
    queue->available.flags = NO_INTERRUPT;
    return start_disk(at, FEATURE_FLUSH, QUEUE, queue->descriptors, &queue->available, &queue->used);
}

void forget_disk(u32 disk) { queues[disk].ready = 0; }

static int ready(u32 disk)
{
    if (disk >= MOST || !is_disk(base(disk)))
        return 0;
    if (!queues[disk].ready) {
        queues[disk].available.index = queues[disk].used.index = 0;
        queues[disk].ready = set_up(base(disk), &queues[disk]);
    }
    return queues[disk].ready;
}

u64 disk_size(u32 disk)
{
    if (!ready(disk))
        return 0;
    u64 high = get_register(base(disk) + CAPACITY + 4);
    return (high << 32 | get_register(base(disk) + CAPACITY)) * SECTOR;
}

static void describe(struct queue *queue, u32 n, void *address, u32 length, u16 flags)
{
    struct descriptor *to = &queue->descriptors[n];
    to->address = (u32)address;
    to->length = length;
    to->flags = flags;
    to->next = n + 1;
}

int disk_request(u32 disk, enum request type, u32 sector, void *data, u32 length)
{
    if (!ready(disk))
        return 0;
    struct queue *queue = &queues[disk];
    u32 header[4] = { type, 0, sector, 0 }, descriptors = 0;
    volatile u8 status = 0xff;
    describe(queue, descriptors++, header, sizeof header, NEXT);
    if (length)
        describe(queue, descriptors++, data, length, NEXT | (type == WRITE ? 0 : DEVICE_WRITES));
    describe(queue, descriptors, (void *)&status, 1, DEVICE_WRITES);

    volatile u16 *used = &queue->used.index;
    u16 before = *used;
    queue->available.ring[queue->available.index % QUEUE] = 0;
    barrier();
    queue->available.index++;
    barrier();
    set_register(base(disk) + NOTIFY, 0);
    while (*used == before)
        if (get_register(base(disk) + STATUS) & NEEDS_RESET)
            return 0;
    barrier();
    return status == 0;
}

/* Asks for what no driver may ask for, and says whether the device waits for a reset then. */
int break_disk(u32 disk, enum broken rule)
{
    if (!ready(disk))
        return 0;
    struct queue *queue = &queues[disk];
    u32 header[4] = { READ, 0, 0, 0 };
    u16 ahead = 1;
    describe(queue, 0, header, sizeof header, NEXT);
    describe(queue, 1, header, 16, NEXT);
    describe(queue, 2, header, 1, DEVICE_WRITES);
    if (rule == LOOP)
        queue->descriptors[1].next = 0;
    else if (rule == OUTSIDE)
        queue->descriptors[0].address = 0xf0000000;
    else if (rule == INDEX)
        ahead = QUEUE + 1;
    else if (rule == SHORT)
        describe(queue, 0, header, 4, 0);
    else if (rule == LIVE)
        set_address(base(disk) + DESCRIPTORS, header);
    queue->available.ring[queue->available.index % QUEUE] = 0;
    barrier();
    queue->available.index += ahead;
    barrier();
    set_register(base(disk) + NOTIFY, 0);
    for (u32 tries = 0; tries < 1000000; tries++)
        if (get_register(base(disk) + STATUS) & NEEDS_RESET)
            return 1;
    return 0;
}
