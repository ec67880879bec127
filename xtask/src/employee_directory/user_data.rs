//! What the first instance is given to do: install a web server and the application, with its data on the second
//! volume, and an agent that has its file systems stand still for an image.

use serde_json::{Value, json};

/// Where the data is mounted.
pub(super) const DATA: &str = "/srv/employee-directory";

/// To which file the scripts of [`first_boot`] add a line.
pub(super) const FIRST_BOOTS: &str = "/var/log/first-boots";

/// Where the guest's agent listens.
pub(super) const AGENT: u32 = 9999;

/// Between the parts.
const BOUNDARY: &str = "a-part-of-the-user-data";

/// A script that leaves a line at each of its runs.
pub(super) fn first_boot(line: &str) -> String {
    format!("#!/bin/sh\necho {line} >> {FIRST_BOOTS}\n")
}

/// All that the first instance is given: the configuration and a script, as parts of one message (RFC 2046).
pub(super) fn of_first() -> String {
    let part = |kind: &str, content: &str| {
        format!("--{BOUNDARY}\r\nContent-Type: text/{kind}; charset=\"utf-8\"\r\n\r\n{content}\r\n")
    };
    let head = format!("MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=\"{BOUNDARY}\"\r\n\r\n");
    let parts = part("cloud-config", &cloud_config()) + &part("x-shellscript", &first_boot("first"));
    head + &parts + &format!("--{BOUNDARY}--\r\n")
}

/// The cloud-config, which is YAML, and so may be JSON.
fn cloud_config() -> String {
    let file = |path: &str, content: &str| json!({ "path": path, "content": content });
    let config: Value = json!({
        "fs_setup": [{ "device": "/dev/vdb", "filesystem": "ext4", "label": "data", "overwrite": false }],
        // However long an emulated processor takes to come to it: systemd gives a device 90 seconds.
        "mounts": [["LABEL=data", DATA, "ext4", "defaults,nofail,x-systemd.device-timeout=0", "0", "2"]],
        "write_files": [
            file("/opt/employee-directory/app.py", include_str!("../../guest/employee-directory/app.py")),
            file(
                "/etc/systemd/system/employee-directory.service",
                include_str!("../../guest/employee-directory/app.service"),
            ),
            file("/etc/nginx/conf.d/app.conf", include_str!("../../guest/employee-directory/nginx.conf")),
            // Any address of the guest's.
            file("/etc/qemu/qemu-ga.conf", &format!("[general]\nmethod = vsock-listen\npath = {}:{AGENT}\n", u32::MAX)),
            file(
                "/etc/systemd/system/qemu-guest-agent.service",
                include_str!("../../guest/employee-directory/agent.service"),
            ),
        ],
        "package_update": true,
        "packages": ["nginx-light", "qemu-guest-agent"],
        "runcmd": [
            ["systemctl", "daemon-reload"],
            ["systemctl", "enable", "qemu-guest-agent"],
            ["systemctl", "restart", "qemu-guest-agent"],
            ["rm", "-f", "/etc/nginx/sites-enabled/default"],
            ["systemctl", "enable", "--now", "employee-directory"],
            ["systemctl", "reload-or-restart", "nginx"],
        ],
    });
    format!("#cloud-config\n{config}\n")
}
