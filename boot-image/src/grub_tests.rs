use super::*;

/// As `grub-mkconfig` of Debian 12 writes it, less the parts that repeat.
const DEBIAN: &str = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="DEFAULT"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
else
  menuentry_id_option=""
fi
function load_video {
  if [ x$feature_all_video_module = xy ]; then
    insmod all_video
  fi
}
if [ x$feature_default_font_path = xy ] ; then
   font=unicode
else
insmod part_gpt
set root='hd0,gpt1'
    font="/usr/share/grub/unicode.pf2"
fi
function gfxmode {
	set gfxpayload="${1}"
}
set linux_gfx_mode=
export linux_gfx_mode
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-1234' {
	load_video
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	insmod ext2
	set root='hd0,gpt1'
	if [ x$feature_platform_search_hint = xy ]; then
	  search --no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1  1234
	else
	  search --no-floppy --fs-uuid --set=root 1234
	fi
	echo	'Loading Linux 6.1.0-49-cloud-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-49-cloud-amd64 root=PARTUUID=ab-cd ro  console=tty0 console=ttyS0,115200
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-6.1.0-49-cloud-amd64
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-1234' {
	menuentry 'Debian, with Linux 6.1.0-49' --class debian $menuentry_id_option 'new-1234' {
		linux	/boot/new root=/dev/sda1
		initrd	/boot/new.img
	}
	menuentry 'Debian, with Linux 6.1.0-48' $menuentry_id_option 'old-1234' {
		linux	/boot/old root=/dev/sda1 single
	}
}
menuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
	fwsetup
}
"#;

fn check(text: &str, grubenv: &str) -> Result<Option<MenuEntry>> {
    default_entry(text, &environment(grubenv))
}

#[test]
fn reads_debians_configuration() {
    let entry = check(&DEBIAN.replace("DEFAULT", "0"), "").unwrap().unwrap();
    let expected = MenuEntry {
        title: "Debian GNU/Linux".to_owned(),
        linux: "/boot/vmlinuz-6.1.0-49-cloud-amd64".to_owned(),
        initrds: vec!["/boot/initrd.img-6.1.0-49-cloud-amd64".to_owned()],
        options: "root=PARTUUID=ab-cd ro console=tty0 console=ttyS0,115200".to_owned(),
    };
    assert_eq!(entry, expected);
}

#[test]
fn follows_the_default() {
    let simple = "/boot/vmlinuz-6.1.0-49-cloud-amd64";
    for (default, grubenv, linux) in [
        ("0", "", simple),
        ("1", "", "/boot/new"),
        ("1>0", "", "/boot/new"),
        ("1>1", "", "/boot/old"),
        ("gnulinux-advanced-1234>old-1234", "", "/boot/old"),
        ("Advanced options>Debian, with Linux 6.1.0-48", "", "/boot/old"),
        ("Debian GNU/Linux", "", simple),
        // What cannot be booted or found falls back to the first entry that boots Linux.
        ("2", "", simple),
        ("7", "", simple),
        ("nothing", "", simple),
        ("0>0", "", simple),
        ("", "", simple),
        ("${saved_entry}", "", simple),
        ("${saved_entry}", "# GRUB Environment Block\nsaved_entry=1>1\n####", "/boot/old"),
        // An entry that was chosen for one boot is not followed: it could not be cleared.
        ("0", "next_entry=1>1", simple),
    ] {
        let entry = check(&DEBIAN.replace("DEFAULT", default), grubenv).unwrap().unwrap();
        assert_eq!(entry.linux, linux, "{default:?} with {grubenv:?}");
    }
}

#[test]
fn reads_the_language() {
    // The configuration, the kernel, its command line, and the initial RAM disks.
    for (text, linux, options, initrds) in [
        ("menuentry a { linux /k a b; initrd /i }", "/k", "a b", "/i"),
        ("menuentry a {\nlinux ($root)/k\n initrd (hd0,gpt1)/i /j\n}", "/k", "", "/i /j"),
        ("menuentry a {\nlinuxefi /k 'x y'=\"z\"\\ w # no\n}", "/k", "x y=z w", ""),
        (
            "set k=/vm\nmenuentry a {\nset o=\"ro $k\"\nlinux ${k}linuz \"$o\" \\\n  quiet\n}",
            "/vmlinuz",
            "ro /vm quiet",
            "",
        ),
        ("set k='$x'\nmenuentry a { linux /k y=$k }", "/k", "y=$x", ""),
        ("menuentry a { linux /k x=\\$y z=\"\\$q\" }", "/k", "x=$y z=$q", ""),
        ("menuentry a { if [ 1 = 2 ]; then echo linux; fi; linux /k }", "/k", "", ""),
        ("menuentry memtest { linux16 /m }", "/m", "", ""),
        ("linux /top\nmenuentry a { echo }\nmenuentry b { linux /k }", "/k", "", ""),
        ("} fi } menuentry a { linux /k", "/k", "", ""),
    ] {
        let entry = check(text, "").unwrap().unwrap_or_default();
        assert_eq!(
            (&*entry.linux, &*entry.options, &*entry.initrds.join(" ")),
            (linux, options, initrds),
            "{text}"
        );
    }
}

#[test]
fn says_what_it_cannot_know() {
    for (text, why) in [
        ("menuentry a { linux /k root=$dev }", "uses the variable dev"),
        ("if x; then set o=1; fi\nmenuentry a { linux /k $o }", "uses the variable o"),
        ("function f { set o=1 }\nmenuentry a { linux /k $o }", "uses the variable o"),
        ("menuentry a { if x; then linux /k; else linux /j; fi }", "under a condition"),
        ("menuentry a { linux /k; if x; then initrd /i; fi }", "under a condition"),
        ("menuentry a { linux }", "names no file"),
    ] {
        let error = check(text, "").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{text}");
        assert!(error.to_string().contains(why), "{text}: {error}");
    }
    for text in
        ["", "menuentry a { chainloader +1 }", "linux /k", "{", "}", "'", "\"", "\\", "$", "menuentry"]
    {
        assert_eq!(check(text, "").unwrap(), None, "{text}");
    }
}

#[test]
fn bounds_what_it_reads() {
    let doubling = format!("set a=xxxxxxxx\n{}menuentry a {{ linux /k $a }}", "set a=$a$a\n".repeat(60));
    assert_eq!(check(&doubling, "").unwrap_err().kind(), ErrorKind::Unsupported);
    for block in ["if\n", "submenu x {\n", "function f {\n"] {
        assert_eq!(check(&block.repeat(100_000), "").unwrap_err().kind(), ErrorKind::Unsupported, "{block}");
    }
}

#[test]
fn braces_and_keywords_in_quotes_are_words() {
    let text = "menuentry x {\n linux /k '{' \"}\" \\{ a '}'\n 'then' x\n initrd /i\n}\n";
    let entry = default_entry(text, &BTreeMap::new()).unwrap().unwrap();
    assert_eq!((entry.linux.as_str(), entry.options.as_str()), ("/k", "{ } { a }"));
    assert_eq!(entry.initrds, ["/i"]);
}

/// Two bytes may stand for 64 KiB, in one command or in many.
#[test]
fn what_variables_come_to_is_bounded() {
    let long = "x".repeat(MAX_WORD - 2);
    for text in [
        format!("set a={long}\necho {}\n", "$a ".repeat(1000)),
        format!("set a={long}\n{}", "$a\n".repeat(1000)),
    ] {
        let error = default_entry(&text, &BTreeMap::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    }
    let fits = format!("set a={long}\n{}menuentry x {{ linux /k\n }}", "$a\n".repeat(100));
    assert_eq!(default_entry(&fits, &BTreeMap::new()).unwrap().unwrap().linux, "/k");
}
