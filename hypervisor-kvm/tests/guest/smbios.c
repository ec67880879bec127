/* The SMBIOS tables: fields by the names that Linux gives them in /sys/class/dmi/id (DMTF DSP0134). */
#include "guest.h"

enum { ENTRY_POINTS = 0xf0000, END = 0x100000, STEP = 16 };
enum { LAST_STRUCTURE = 127, UUID = 8, UUID_LENGTH = 16 };

static const struct { const char *name; u8 type, offset; } fields[] = {
    { "bios_vendor", 0, 4 },     { "sys_vendor", 1, 4 },      { "product_name", 1, 5 },
    { "product_serial", 1, 7 },  { "product_uuid", 1, UUID }, { "board_asset_tag", 2, 8 },
    { "chassis_asset_tag", 3, 8 },
};

/* The first structure, or 0. */
static const u8 *structures(void)
{
    for (const u8 *at = (const u8 *)ENTRY_POINTS; at < (const u8 *)END; at += STEP)
        if (at[0] == '_' && at[1] == 'S' && at[2] == 'M' && at[3] == '3' && at[4] == '_')
            return *(const u8 *const *)(at + 16);
    return 0;
}

static const u8 *after_strings(const u8 *structure)
{
    const u8 *at = structure + structure[1];
    while (at[0] || at[1])
        at++;
    return at + 2;
}

static void say_string(const u8 *structure, u8 number, void (*say)(char))
{
    const u8 *at = structure + structure[1];
    if (!number)
        return;
    while (--number)
        while (*at++)
            ;
    while (*at)
        say(*at++);
}

/* The first three groups have their lowest byte first. */
static void say_uuid(const u8 *bytes, void (*say)(char))
{
    static const u8 order[UUID_LENGTH] = { 3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15 };
    for (u32 n = 0; n < UUID_LENGTH; n++) {
        if (n == 4 || n == 6 || n == 8 || n == 10)
            say('-');
        say("0123456789abcdef"[bytes[order[n]] >> 4]);
        say("0123456789abcdef"[bytes[order[n]] & 15]);
    }
}

void say_smbios_field(const char *name, void (*say)(char))
{
    const u8 *at = structures();
    for (; at && at[0] != LAST_STRUCTURE; at = after_strings(at))
        for (u32 n = 0; n < sizeof fields / sizeof *fields; n++)
            if (at[0] == fields[n].type && is(name, fields[n].name)) {
                if (fields[n].offset == UUID && at[0] == 1)
                    say_uuid(at + UUID, say);
                else
                    say_string(at, at[fields[n].offset], say);
            }
}
