/* A driver of virtio network devices that answers ARP and ICMP echo requests. */
#include "guest.h"

enum { FIRST = 0xd0000000, DISTANCE = 0x1000, MOST = 16, PORTS = 4, QUEUE = 8, ROOM = 2048 };
enum {
    MAGIC = 0x00, VERSION = 0x04, DEVICE = 0x08, DRIVER_FEATURES = 0x20, DRIVER_SELECT = 0x24,
    QUEUE_SELECT = 0x30, QUEUE_SIZE = 0x38, QUEUE_READY = 0x44, NOTIFY = 0x50, STATUS = 0x70,
    DESCRIPTORS = 0x80, AVAILABLE = 0x90, USED = 0xa0, CONFIG = 0x100, MTU = 10,
};
enum { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8 };
enum { FEATURE_MTU = 1 << 3, FEATURE_MAC = 1 << 5, FEATURE_VERSION_1 = 1 << 0 /* of the high half */ };
enum { DEVICE_WRITES = 2, NO_INTERRUPT = 1 };
enum { RECEIVE, TRANSMIT, HEADER = 12, SHORTEST = 60 };
/* Where a frame has what. */
enum { TARGET = 0, SENDER = 6, TYPE = 12, ARP = 14, IP = 14, IP_FROM = 26, IP_TO = 30, ICMP = 34 };

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

static struct port {
    u32 up;
    u8 address[4];
    struct queue queues[2];
    u8 buffers[2][QUEUE][ROOM] __attribute__((aligned(16)));
} ports[PORTS];

/* The registers of the n-th network device, or nothing. */
static u32 base(u32 n)
{
    for (u32 device = 0; device < MOST; device++) {
        u32 at = FIRST + device * DISTANCE;
        int is_net = get_register(at + MAGIC) == 0x74726976 && get_register(at + DEVICE) == 1;
        if (is_net && get_register(at + VERSION) == 2 && n-- == 0)
            return at;
    }
    return 0;
}

u32 count_nets(void)
{
    u32 nets = 0;
    while (base(nets))
        nets++;
    return nets;
}

int net_mac(u32 n, u8 mac[6])
{
    u32 at = base(n);
    for (u32 byte = 0; at && byte < 6; byte++)
        mac[byte] = get_register(at + CONFIG + byte / 4 * 4) >> 8 * (byte % 4);
    return at != 0;
}

u32 net_mtu(u32 n)
{
    u32 at = base(n);
    return at ? get_register(at + CONFIG + MTU / 4 * 4) >> 16 : 0;
}

static void make_available(struct queue *queue, u32 n, u32 length, u16 flags)
{
    queue->descriptors[n].length = length;
    queue->descriptors[n].flags = flags;
    queue->available.ring[queue->available.index % QUEUE] = n;
    barrier();
    queue->available.index++;
    barrier();
}

static void set_address(u32 at, const void *address)
{
    set_register(at, (u32)address);
    set_register(at + 4, 0);
}

int net_up(u32 n, const u8 address[4])
{
    u32 at = base(n), status = ACKNOWLEDGE | DRIVER;
    if (!at || n >= PORTS)
        return 0;
    struct port *port = &ports[n];
    set_register(at + STATUS, 0);
    set_register(at + STATUS, status);
    set_register(at + DRIVER_SELECT, 0);
    set_register(at + DRIVER_FEATURES, FEATURE_MAC | FEATURE_MTU);
    set_register(at + DRIVER_SELECT, 1);
    set_register(at + DRIVER_FEATURES, FEATURE_VERSION_1);
    set_register(at + STATUS, status |= FEATURES_OK);
    for (u32 q = RECEIVE; q <= TRANSMIT; q++) {
        struct queue *queue = &port->queues[q];
        set_register(at + QUEUE_SELECT, q);
        set_register(at + QUEUE_SIZE, QUEUE);
        set_address(at + DESCRIPTORS, queue->descriptors);
        set_address(at + AVAILABLE, &queue->available);
        set_address(at + USED, &queue->used);
        queue->available.flags = NO_INTERRUPT;
        for (u32 d = 0; d < QUEUE; d++)
            queue->descriptors[d].address = (u32)port->buffers[q][d];
        set_register(at + QUEUE_READY, 1);
    }
    set_register(at + STATUS, status | DRIVER_OK);
    for (u32 d = 0; d < QUEUE; d++)
        make_available(&port->queues[RECEIVE], d, ROOM, DEVICE_WRITES);
    set_register(at + NOTIFY, RECEIVE);
    for (u32 byte = 0; byte < 4; byte++)
        port->address[byte] = address[byte];
    port->up = at;
    return 1;
}

static int same(const u8 *a, const u8 *b, u32 length)
{
    while (length && *a == *b)
        a++, b++, length--;
    return !length;
}

static void copy(u8 *to, const u8 *from, u32 length)
{
    while (length--)
        *to++ = *from++;
}

/* Turns a question into its answer, in place. */
static int answer(struct port *port, u32 n, u8 *frame)
{
    u8 mac[6];
    net_mac(n, mac);
    if (frame[TYPE] == 8 && frame[TYPE + 1] == 6) {
        u8 *arp = frame + ARP;
        if (arp[7] != 1 || !same(arp + 24, port->address, 4))
            return 0;
        arp[7] = 2;
        copy(arp + 18, arp + 8, 10);
        copy(arp + 8, mac, 6);
        copy(arp + 14, port->address, 4);
    } else if (frame[TYPE] == 8 && frame[TYPE + 1] == 0) {
        if (frame[IP] != 0x45 || frame[IP + 9] != 1 || frame[ICMP] != 8 || !same(frame + IP_TO, port->address, 4))
            return 0;
        copy(frame + IP_TO, frame + IP_FROM, 4);
        copy(frame + IP_FROM, port->address, 4);
        frame[ICMP] = 0;
        /* The sum lacks the type that was there: 8 in the high byte of a word. */
        u32 sum = (frame[ICMP + 2] << 8 | frame[ICMP + 3]) + 0x800;
        sum = (sum & 0xffff) + (sum >> 16);
        frame[ICMP + 2] = sum >> 8;
        frame[ICMP + 3] = sum;
    } else {
        return 0;
    }
    copy(frame + TARGET, frame + SENDER, 6);
    copy(frame + SENDER, mac, 6);
    return 1;
}

/* Whether the device has used a buffer, and which. */
static int take_used(struct queue *queue, u32 *id, u32 *length)
{
    if (*(volatile u16 *)&queue->used.index == queue->seen)
        return 0;
    barrier();
    *id = queue->used.ring[queue->seen % QUEUE].id;
    *length = queue->used.ring[queue->seen % QUEUE].length;
    queue->seen++;
    return 1;
}

/* Answers what has come. False if no port is up. */
int serve_nets(void)
{
    int up = 0;
    for (u32 n = 0; n < PORTS; n++) {
        struct port *port = &ports[n];
        struct queue *receive = &port->queues[RECEIVE], *transmit = &port->queues[TRANSMIT];
        u32 id, length, sent, ignored;
        if (!port->up)
            continue;
        up = 1;
        while (take_used(receive, &id, &length)) {
            u8 *frame = port->buffers[RECEIVE][id] + HEADER;
            if (length > HEADER && answer(port, n, frame)) {
                /* One buffer at a time, waited for: there is always one. */
                u8 *to = port->buffers[TRANSMIT][0];
                for (u32 byte = 0; byte < HEADER; byte++)
                    to[byte] = 0;
                copy(to + HEADER, frame, length - HEADER);
                make_available(transmit, 0, length, 0);
                set_register(port->up + NOTIFY, TRANSMIT);
                while (!take_used(transmit, &sent, &ignored))
                    ;
            }
            make_available(receive, id, ROOM, DEVICE_WRITES);
            set_register(port->up + NOTIFY, RECEIVE);
        }
    }
    return up;
}
