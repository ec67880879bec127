/* Makes ready a queue with many requests, and has storm64.S push them. */
#include "virtio.h"

enum { DEPTH = 32, PARTS = 3, QUEUE = 128, BLOCK = 4096, SECTORS = BLOCK / SECTOR };

/* The layout is known to storm64.S. */
static struct {
    u64 available, used, headers, statuses, notify;
    u64 requests, last_block, notifications, failures;
} storm;

static struct descriptor descriptors[QUEUE] __attribute__((aligned(16)));
static struct { u16 flags, index, ring[QUEUE], used_event; } available;
static struct { u16 flags, index; struct { u32 id, length; } ring[QUEUE]; u16 available_event; } used
    __attribute__((aligned(4)));
/* One for each descriptor, though only the first of a request has one. */
static u32 headers[QUEUE][4];
static u8 statuses[QUEUE], blocks[DEPTH][BLOCK] __attribute__((aligned(BLOCK)));

void storm64(void);

static void describe(u32 n, void *address, u32 length, u16 flags)
{
    descriptors[n].address = (u32)address;
    descriptors[n].length = length;
    descriptors[n].flags = flags;
    descriptors[n].next = n + 1;
}

int storm_disk(u32 disk, enum request type, u32 requests, u32 *notifications)
{
    u32 disk_blocks = disk_size(disk) >> 12;
    if (!disk_blocks || disk_blocks & (disk_blocks - 1) || requests < DEPTH)
        return 0;
    for (u32 n = 0; n < DEPTH; n++) {
        u32 first = n * PARTS;
        headers[first][0] = type;
        describe(first, headers[first], sizeof headers[first], NEXT);
        describe(first + 1, blocks[n], BLOCK, NEXT | (type == WRITE ? 0 : DEVICE_WRITES));
        describe(first + 2, &statuses[first], 1, DEVICE_WRITES);
    }
    available.index = used.index = used.available_event = 0;
    /* No interrupt before the index comes round to here. */
    available.used_event = 0xffff;
    storm.available = (u32)&available;
    storm.used = (u32)&used;
    storm.headers = (u32)headers;
    storm.statuses = (u32)statuses;
    storm.notify = notify_at(base(disk));
    storm.requests = requests;
    storm.last_block = disk_blocks - 1;
    storm.notifications = storm.failures = 0;
    forget_disk(disk);
    if (!start_disk(base(disk), FEATURE_FLUSH | FEATURE_EVENT_INDEX, QUEUE, descriptors, &available, &used))
        return 0;
    enter_user(storm64, (u32)&storm);
    *notifications = storm.notifications;
    return storm.failures == 0;
}
