"""An employee directory: create, list and show employees, each with a photo. A directory for each under DATA."""
import email.parser
import email.policy
import html
import http.server
import json
import os
import pathlib
import re
import sys
import urllib.parse

DATA = pathlib.Path(sys.argv[1])
LONGEST = 8 << 20


def page(title, body):
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1>{body}".encode()


FORM = ("<form method=post action=/employees enctype=multipart/form-data>"
        "<input name=name placeholder=Name required> <input name=title placeholder=Title> "
        "<input name=photo type=file> <button>Add</button></form>")


def employees():
    for path in sorted(DATA.glob("*/record.json"), key=lambda path: int(path.parent.name)):
        yield path.parent.name, json.loads(path.read_text())


def save(path, content):
    """Whole or not at all, and on the disk when this returns."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body, kind="text/html; charset=utf-8", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        match = re.fullmatch(r"/employees/(\d{1,9})(/photo)?", urllib.parse.urlsplit(self.path).path)
        if self.path == "/":
            items = "".join(f"<li><a href=/employees/{n}>{html.escape(e['name'])}</a>" for n, e in employees())
            return self.answer(200, page("Employee directory", f"<ul>{items}</ul>{FORM}"))
        place = DATA / match[1] if match else None
        if not place or not (place / "record.json").exists():
            return self.answer(404, page("Not found", ""))
        if match[2]:
            photo = place / "photo"
            return self.answer(200, photo.read_bytes(), "application/octet-stream") if photo.exists() \
                else self.answer(404, page("No photo", ""))
        employee = json.loads((place / "record.json").read_text())
        photo = f"<img src=/employees/{match[1]}/photo>" if (place / "photo").exists() else ""
        self.answer(200, page(html.escape(employee["name"]), html.escape(employee["title"]) + photo))

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        if self.path != "/employees" or length > LONGEST:
            return self.answer(400, page("Bad request", ""))
        head = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n"
        form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + self.rfile.read(length))
        fields = {part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
                  for part in form.iter_parts()}
        name = fields.get("name", b"").decode().strip()
        if not name:
            return self.answer(400, page("An employee has a name", ""))
        number = max((int(n) for n, _ in employees()), default=0) + 1
        place = DATA / str(number)
        place.mkdir(exist_ok=True)
        if fields.get("photo"):
            save(place / "photo", fields["photo"])
        record = {"name": name, "title": fields.get("title", b"").decode()}
        save(place / "record.json", json.dumps(record).encode())
        self.answer(303, b"", Location=f"/employees/{number}")


http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
