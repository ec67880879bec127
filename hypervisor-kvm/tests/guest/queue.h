/* What drivers of devices share, as far as they are not older than this. */

enum { FIRST = 0xd0000000, DISTANCE = 0x1000, MOST = 17, QUEUE = 8 };
enum {
    MAGIC = 0x00, VERSION = 0x04, DEVICE = 0x08, DRIVER_FEATURES = 0x20, DRIVER_SELECT = 0x24,
    QUEUE_SELECT = 0x30, QUEUE_SIZE = 0x38, QUEUE_READY = 0x44, NOTIFY = 0x50, STATUS = 0x70,
    DESCRIPTORS = 0x80, AVAILABLE = 0x90, USED = 0xa0, CONFIG = 0x100,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { FEATURE_VERSION_1 = 1 << 0 /* of the high half */ };
enum { DEVICE_WRITES = 2, NO_INTERRUPT = 1 };

struct descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};

struct queue {
    struct descriptor descriptors[QUEUE];
    struct { u16 flags, index, ring[QUEUE]; } available;
    struct { u16 flags, index; struct { u32 id, length; } ring[QUEUE]; } used __attribute__((aligned(4)));
    u16 seen;
} __attribute__((aligned(16)));

/* queue.c: the registers of a device of this type with its queues set up, or nothing. The features are of the low half. */
u32 bring_up(u32 type, u32 features, struct queue *queues, u32 count);
/* Puts a buffer of one descriptor into a queue and tells the device. */
void give(u32 device, u32 number, struct queue *queue, u32 n, const void *address, u32 length, u16 flags);
/* Whether the device has used a buffer, and which. */
int take(struct queue *queue, u32 *n, u32 *length);
