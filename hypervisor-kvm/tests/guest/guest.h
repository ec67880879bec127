/* What the parts of the guest share. */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }

static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }

static inline u8 inb(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u16 inw(u16 port)
{
    u16 value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u32 inl(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* A register of a device, or memory that a device or another processor changes. */
static inline u32 load(u32 address) { return *(volatile u32 *)address; }
static inline void store(u32 address, u32 value) { *(volatile u32 *)address = value; }
static inline void barrier(void) { __asm__ volatile("" : : : "memory"); }

/* pci.c: a register of a virtio device, where it is on virtio-mmio, and where the device is notified. */
u32 get_register(u32 at);
void set_register(u32 at, u32 value);
u32 notify_at(u32 device);

/* What a PVH kernel is told (Xen, public/arch-x86/hvm/start_info.h). */
struct start_info {
    u32 magic, version, flags, modules;
    u64 module_list, command_line, rsdp, memory_map;
    u32 memory_map_entries, reserved;
};

/* entry.S and user.S */
void wait_for_interrupt(void);
void interrupt(void);
void count(u32 turns);
void enter_user(void (*code)(void), u32 argument);
void count_in_user(void);
extern u8 trampoline[], trampoline_end[], trampoline_counter[];

/* main.c: whether two texts are the same. */
int is(const char *a, const char *b);

/* smbios.c: nothing is said of a field that is not there. */
void say_smbios_field(const char *name, void (*say)(char));

/* net.c */
u32 count_nets(void);
int net_mac(u32 net, u8 mac[6]);
u32 net_mtu(u32 net);
int net_up(u32 net, const u8 address[4]);
int serve_nets(void);

/* flood.c: whether a network device has been given buffers that it has to do with for long. */
int flood(void);

/* vsock.c: the guest's address, or zero; whether the host answered. */
u32 vsock_up(void);
int vsock_connect(u32 port);
int serve_vsock(void);

/* console.c: columns, and rows in the high half; zero if there is none. */
u32 console_size(void);
int serve_console(void);

/* balloon.c: in pages. */
u32 balloon_target(void);
void inflate(u32 first, u32 count);
/* Says that pages are free, which they are until the device has answered. */
void report(u32 first, u32 count);
/* Puts a long list into it, again and again, once that is prepared. */
void prepare_list(u32 count);
void inflate_list(u32 count);
void prepare_hoard(void);
void hoard(void);

/* time.c: nanoseconds by the clock that KVM gives its guests. */
u64 kvm_clock(void);

/* misuse.c: brings a device of this type up and makes more available in a queue of it than there can be; whether it then waits
   for a reset. */
int misuse(u32 type, u32 queue);
/* Brings it up anew and gives it a buffer that is good; whether it uses that. */
int use(u32 type, u32 queue);

/* cpus.c */
u32 count_cpus(const struct start_info *info);

/* disk.c */
enum { SECTOR = 512, SERIAL_MAX = 20 };
enum request { READ = 0, WRITE = 1, FLUSH = 4, GET_ID = 8 };
u32 count_disks(void);
u64 disk_size(u32 disk);
/* False if the disk refuses. */
int disk_request(u32 disk, enum request type, u32 sector, void *data, u32 length);
/* A chain without an end, one outside of the memory, more requests than there are, one that is shorter than its header, and a
   queue that is moved while it is in use. */
enum broken { LOOP, OUTSIDE, INDEX, SHORT, LIVE, RULES };
int break_disk(u32 disk, enum broken rule);
/* Its next request starts it anew: it has had another driver, or waits for a reset. */
void forget_disk(u32 disk);

/* storm.c: as many requests of 4 KiB at random places, many at once, from a driver in ring 3. False if one
   failed. */
int storm_disk(u32 disk, enum request type, u32 requests, u32 *notifications);
