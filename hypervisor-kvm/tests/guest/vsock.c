/* A driver of the virtio socket device that sends back what comes, on streams to its port 7 and on its own. */
#include "guest.h"
#include "queue.h"

enum { TYPE = 19, RECEIVE = 0, TRANSMIT = 1, QUEUES = 3, ROOM = 4096, BUFFERS = QUEUE };
enum { HOST = 2, ECHO = 7, OWN = 1024, STREAM = 1, CREDIT = BUFFERS * ROOM };
enum { REQUEST = 1, RESPONSE, RESET, SHUTDOWN, DATA, CREDIT_UPDATE, CREDIT_REQUEST };

struct packet {
    u64 from, to;
    u32 from_port, to_port, length;
    u16 type, op;
    u32 flags, room, taken;
    u8 data[ROOM - 44];
} __attribute__((packed));

static struct queue queues[QUEUES];
static struct packet buffers[BUFFERS] __attribute__((aligned(16))), answer __attribute__((aligned(16)));
static u32 device, taken, connected;

static void send(u32 from_port, u32 to_port, u16 op, u32 length)
{
    u32 ignored;
    answer.from = get_register(device + CONFIG);
    answer.to = HOST;
    answer.from_port = from_port;
    answer.to_port = to_port;
    answer.length = length;
    answer.type = STREAM;
    answer.op = op;
    answer.flags = 0;
    answer.room = CREDIT;
    answer.taken = taken;
    give(device, TRANSMIT, &queues[TRANSMIT], 0, &answer, 44 + length, 0);
    while (!take(&queues[TRANSMIT], &ignored, &ignored))
        ;
}

static void heed(const struct packet *packet)
{
    u32 own = packet->to_port, other = packet->from_port;
    if (packet->op == REQUEST) {
        taken = 0;
        send(own, other, own == ECHO ? RESPONSE : RESET, 0);
    } else if (packet->op == RESPONSE) {
        taken = 0;
        connected = 1;
    } else if (packet->op == DATA) {
        for (u32 n = 0; n < packet->length; n++)
            answer.data[n] = packet->data[n];
        taken += packet->length;
        send(own, other, DATA, packet->length);
    } else if (packet->op == SHUTDOWN) {
        send(own, other, RESET, 0);
    } else if (packet->op == CREDIT_REQUEST) {
        send(own, other, CREDIT_UPDATE, 0);
    }
}

int serve_vsock(void)
{
    u32 n, length;
    while (device && take(&queues[RECEIVE], &n, &length)) {
        heed(&buffers[n]);
        give(device, RECEIVE, &queues[RECEIVE], n, &buffers[n], ROOM, DEVICE_WRITES);
    }
    return device != 0;
}

u32 vsock_up(void)
{
    if (!device && (device = bring_up(TYPE, 0, queues, QUEUES)))
        for (u32 n = 0; n < BUFFERS; n++)
            give(device, RECEIVE, &queues[RECEIVE], n, &buffers[n], ROOM, DEVICE_WRITES);
    return device ? get_register(device + CONFIG) : 0;
}

int vsock_connect(u32 port)
{
    if (!vsock_up())
        return 0;
    connected = 0;
    send(OWN, port, REQUEST, 0);
    for (u32 turns = 0; !connected && turns < 100000; turns++)
        serve_vsock();
    return connected;
}
