//! What the first instance is given to do: install a web server and the application, with its data on the second
//! volume.

use serde_json::{Value, json};

/// Where the data is mounted.
pub(super) const DATA: &str = "/srv/employee-directory";

/// The cloud-config, which is YAML, and so may be JSON.
pub(super) fn cloud_config() -> String {
    let file = |path: &str, content: &str| json!({ "path": path, "content": content });
    let config: Value = json!({
        "fs_setup": [{ "device": "/dev/vdb", "filesystem": "ext4", "label": "data", "overwrite": false }],
        "mounts": [["LABEL=data", DATA, "ext4", "defaults,nofail", "0", "2"]],
        "write_files": [
            file("/opt/employee-directory/app.py", include_str!("../../guest/employee-directory/app.py")),
            file(
                "/etc/systemd/system/employee-directory.service",
                include_str!("../../guest/employee-directory/app.service"),
            ),
            file("/etc/nginx/conf.d/app.conf", include_str!("../../guest/employee-directory/nginx.conf")),
        ],
        "package_update": true,
        "packages": ["nginx-light"],
        "runcmd": [
            ["rm", "-f", "/etc/nginx/sites-enabled/default"],
            ["systemctl", "enable", "--now", "employee-directory"],
            ["systemctl", "reload-or-restart", "nginx"],
        ],
    });
    format!("#cloud-config\n{config}\n")
}
