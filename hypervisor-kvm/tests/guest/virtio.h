/* What the drivers of virtio block devices share. */
#include "guest.h"

enum { FIRST = 0xd0000000, DISTANCE = 0x1000, MOST = 16 };
enum {
    MAGIC = 0x00, VERSION = 0x04, DEVICE = 0x08, DRIVER_FEATURES = 0x20, DRIVER_SELECT = 0x24,
    DEVICE_FEATURES = 0x10, DEVICE_SELECT = 0x14, QUEUE_SELECT = 0x30, QUEUE_SIZE = 0x38,
    QUEUE_READY = 0x44, NOTIFY = 0x50, STATUS = 0x70, DESCRIPTORS = 0x80, AVAILABLE = 0x90, USED = 0xa0,
    CONFIG = 0x100, CAPACITY = CONFIG, IS_VIRTIO = 0x74726976,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64 };
enum { FEATURE_FLUSH = 1 << 9, FEATURE_EVENT_INDEX = 1 << 29, FEATURE_VERSION_1 = 1 << 0 /* of the high half */ };
enum { NEXT = 1, DEVICE_WRITES = 2, NO_INTERRUPT = 1 };

struct descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};

static inline u32 base(u32 disk) { return FIRST + disk * DISTANCE; }

static inline int is_disk(u32 at)
{
    return get_register(at + MAGIC) == IS_VIRTIO && get_register(at + VERSION) == 2 && get_register(at + DEVICE) == 2;
}

/* disk.c: resets a disk and gives it a queue of this size. */
int start_disk(u32 at, u32 features, u32 size, const void *descriptors, const void *available, const void *used);
