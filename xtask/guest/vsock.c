// Echoes what comes over a stream to the host: `vsock listen PORT` or `vsock connect PORT`. Says on standard
// output what it does. Without a library and of 32 bits, so that every x86 guest's kernel runs it.

enum { EXIT = 1, READ = 3, WRITE = 4, CLOSE = 6, SOCKET = 359, BIND = 361, CONNECT = 362, LISTEN = 363, ACCEPT4 = 364 };
enum { AF_VSOCK = 40, SOCK_STREAM = 1, HOST = 2, ANY = -1 };

struct sockaddr_vm {
    unsigned short family, reserved;
    unsigned port, cid;
    unsigned zero;
};

static int call(int number, long a, long b, long c, long d) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d) : "memory");
    return result;
}

static void say(const char *text) {
    int len = 0;
    while (text[len]) len++;
    call(WRITE, 1, (long)text, len, 0);
}

_Noreturn static void end(int failed) {
    for (;;) call(EXIT, failed, 0, 0, 0);
}

static int unless(int result, const char *what) {
    if (result >= 0) return result;
    say("vsock: ");
    say(what);
    say(" failed\n");
    end(1);
}

static unsigned number(const char *text) {
    unsigned value = 0;
    for (; *text; text++) value = value * 10 + (unsigned)(*text - '0');
    return value;
}

// What is read is written, however little the host takes at once.
static void echo(int stream) {
    static char bytes[16384];
    int len;
    while ((len = call(READ, stream, (long)bytes, sizeof bytes, 0)) > 0)
        for (int done = 0; done < len;)
            done += unless(call(WRITE, stream, (long)bytes + done, len - done, 0), "write");
    say(len < 0 ? "vsock: reset\n" : "vsock: ended\n");
    call(CLOSE, stream, 0, 0, 0);
}

__attribute__((used)) _Noreturn static void start(char **argument) {
    // The stack: how many arguments there are, and the arguments (System V ABI, Intel386 supplement, 2.3.1).
    if ((long)argument[0] != 3) end(2);
    int listens = argument[2][0] == 'l';
    struct sockaddr_vm at = {AF_VSOCK, 0, number(argument[3]), listens ? ANY : HOST, 0};
    int stream = unless(call(SOCKET, AF_VSOCK, SOCK_STREAM, 0, 0), "socket");
    if (listens) {
        unless(call(BIND, stream, (long)&at, sizeof at, 0), "bind");
        unless(call(LISTEN, stream, 1, 0, 0), "listen");
        say("vsock: listening\n");
        stream = unless(call(ACCEPT4, stream, 0, 0, 0), "accept");
    } else {
        unless(call(CONNECT, stream, (long)&at, sizeof at, 0), "connect");
    }
    say("vsock: connected\n");
    echo(stream);
    end(0);
}

__asm__(".globl _start\n_start: xor %ebp, %ebp\n mov %esp, %eax\n and $-16, %esp\n sub $12, %esp\n push %eax\n call start\n");
