/* The registers of virtio devices on whichever transport the machine has: the drivers know those of virtio-mmio, and here
   they are found on PCI, where each device has its range from the beginning (virtio 1.2, 4.1.4). */
#include "virtio.h"

enum { ADDRESS_PORT = 0xcf8, DATA_PORT = 0xcfc, BRIDGE = 0x0d578086, VENDOR = 0x1af4, FIRST_TYPE = 0x1040 };
enum { RANGES = 0xc0000000, RANGE = 0x8000, DEVICE_PART = 0x2000, NOTIFY_PART = 0x3000 };
/* Of the part that all devices have. */
enum {
    OFFERED_SELECT = 0x00, OFFERED = 0x04, ACCEPTED_SELECT = 0x08, ACCEPTED = 0x0c, DEVICE_STATUS = 0x14,
    SELECT = 0x16, SIZE = 0x18, ENABLE = 0x1c, QUEUE_PLACES = 0x20,
};

/* The first word of a device's configuration: its vendor, and what it is. */
static u32 identity(u32 device)
{
    outl(ADDRESS_PORT, 1u << 31 | device << 11);
    return inl(DATA_PORT);
}

static int on_pci(void)
{
    static int known, is;
    if (!known) {
        is = identity(0) == BRIDGE;
        known = 1;
    }
    return is;
}

u32 get_register(u32 at)
{
    u32 device = (at - FIRST) / DISTANCE, offset = (at - FIRST) % DISTANCE, range = RANGES + device * RANGE;
    if (!on_pci())
        return load(at);
    if (offset >= CONFIG)
        return load(range + DEVICE_PART + offset - CONFIG);
    /* Number 0 is the host bridge's. */
    if (offset == MAGIC)
        return (identity(device + 1) & 0xffff) == VENDOR ? IS_VIRTIO : 0;
    if (offset == VERSION)
        return 2;
    if (offset == DEVICE)
        return (identity(device + 1) >> 16) - FIRST_TYPE;
    if (offset == DEVICE_FEATURES)
        return load(range + OFFERED);
    return offset == STATUS ? *(volatile u8 *)(range + DEVICE_STATUS) : 0;
}

void set_register(u32 at, u32 value)
{
    u32 device = (at - FIRST) / DISTANCE, offset = (at - FIRST) % DISTANCE, range = RANGES + device * RANGE;
    if (!on_pci())
        store(at, value);
    else if (offset >= CONFIG)
        store(range + DEVICE_PART + offset - CONFIG, value);
    else if (offset == STATUS)
        *(volatile u8 *)(range + DEVICE_STATUS) = value;
    else if (offset == NOTIFY)
        *(volatile u16 *)(range + NOTIFY_PART) = value;
    else if (offset == QUEUE_SELECT || offset == QUEUE_SIZE || offset == QUEUE_READY)
        *(volatile u16 *)(range + (offset == QUEUE_SELECT ? SELECT : offset == QUEUE_SIZE ? SIZE : ENABLE)) = value;
    else if (offset >= DESCRIPTORS)
        /* Three places of two words, between each of which virtio-mmio leaves two. */
        store(range + QUEUE_PLACES + (offset - DESCRIPTORS) / 16 * 8 + offset % 16, value);
    else if (offset == DEVICE_SELECT)
        store(range + OFFERED_SELECT, value);
    else if (offset == DRIVER_SELECT)
        store(range + ACCEPTED_SELECT, value);
    else if (offset == DRIVER_FEATURES)
        store(range + ACCEPTED, value);
}

u32 notify_at(u32 device)
{
    return on_pci() ? RANGES + (device - FIRST) / DISTANCE * RANGE + NOTIFY_PART : device + NOTIFY;
}
