/* A driver of the virtio console that writes back what is typed, in capitals. */
#include "guest.h"
#include "queue.h"

enum { TYPE = 3, RECEIVE = 0, TRANSMIT = 1, QUEUES = 2, ROOM = 64 };

static struct queue queues[QUEUES];
static u8 typed[QUEUE][ROOM], written[ROOM];
static u32 device;

int serve_console(void)
{
    u32 n, length, ignored;
    while (device && take(&queues[RECEIVE], &n, &length)) {
        for (u32 at = 0; at < length; at++)
            written[at] = typed[n][at] >= 'a' && typed[n][at] <= 'z' ? typed[n][at] - 'a' + 'A' : typed[n][at];
        give(device, TRANSMIT, &queues[TRANSMIT], 0, written, length, 0);
        while (!take(&queues[TRANSMIT], &ignored, &ignored))
            ;
        give(device, RECEIVE, &queues[RECEIVE], n, typed[n], ROOM, DEVICE_WRITES);
    }
    return device != 0;
}

u32 console_size(void)
{
    if (!device && (device = bring_up(TYPE, 0, queues, QUEUES)))
        for (u32 n = 0; n < QUEUE; n++)
            give(device, RECEIVE, &queues[RECEIVE], n, typed[n], ROOM, DEVICE_WRITES);
    return device ? get_register(device + CONFIG) : 0;
}
