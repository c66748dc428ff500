"""``atelier cp``."""

from __future__ import annotations

import click

from atelier.cli.invocation import BYTES, Invocation, json_option, pass_invocation


@click.command(short_help="Copy files and folders.")
@click.argument("source")
@click.argument("destination")
@click.option("-u", "--user", default="", metavar="NAME", help="Whose rights and home folder count in the sandbox.")
@click.option("-r", "--recursive", is_flag=True, hidden=True, help="Folders are copied as such in any case.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
@click.option("--max-bytes", type=BYTES, default="32G", show_default=True, help="Take at most this much of a folder.")
@click.option("--max-entries", type=click.IntRange(min=1), default=1_000_000, show_default=True, metavar="N",
              help="Take at most this many files, folders and links of a folder.")  # fmt: skip
@json_option("Print {source, destination, files, bytes, skipped} as JSON.")
@pass_invocation
def cp(
    invocation: Invocation,
    source: str,
    destination: str,
    user: str,
    recursive: bool,
    quiet: bool,
    max_bytes: int,
    max_entries: int,
    as_json: bool,
) -> None:
    """Copy between this machine and a sandbox, which is written SANDBOX:PATH. A relative PATH starts at the home folder.

    As with cp -r: into a destination that is a folder, else under its name; SOURCE/. stands for a folder's content.
    `-` is stdin or stdout (a folder comes out as a tar stream). A local name with a colon is written ./a:b.

    The sandbox is not trusted. Out of it come plain files, folders, and links that stay inside of the copied folder;
    other links and devices are left out, named, and the exit status is 1. Names that would leave the destination end
    the copy. setuid bits and owners are not kept, and existing links in the destination are not followed.

    \b
    Examples:
      atelier cp notes.txt box:
      atelier cp ./project box:work
      atelier cp box:work/result.csv .
      atelier cp box:/var/log logs
      atelier cp box:data - | tar tv
      echo hello | atelier cp - box:hello.txt
    """
    del recursive
    import os

    from atelier.cli.copying import STANDARD_STREAM, RemotePlace, download, parse_place, upload
    from atelier.cli.output import print_json, print_note, printable, show_bytes
    from atelier.cli.progress import ByteProgress
    from atelier.client.folder_writer import UnpackLimits
    from atelier.client.sandbox import Sandbox

    from_place, to_place = parse_place(source), parse_place(destination)
    to_stdout = destination == STANDARD_STREAM
    with invocation.connect() as connection:
        shown = not quiet and not as_json
        if isinstance(from_place, RemotePlace) and isinstance(to_place, str):
            sandbox = Sandbox.connect(from_place.sandbox, connection=connection)
            limits = UnpackLimits(max_entries=max_entries, max_total_bytes=max_bytes)
            with ByteProgress(source, total_bytes=None, shown=shown) as progress:
                summary = download(sandbox, from_place, to_place, user, limits, progress.advance)
        elif isinstance(from_place, str) and isinstance(to_place, RemotePlace):
            sandbox = Sandbox.connect(to_place.sandbox, connection=connection)
            total = os.stat(from_place).st_size if os.path.isfile(from_place) else None  # noqa: PTH113, PTH116
            with ByteProgress(source, total_bytes=total, shown=shown) as progress:
                summary = upload(sandbox, from_place, to_place, user, progress.advance)
        else:
            raise click.UsageError("One side is SANDBOX:PATH, the other a local path or `-`.")
    if as_json and not to_stdout:
        print_json(
            {
                "source": summary.source,
                "destination": summary.destination,
                "files": summary.file_count,
                "bytes": summary.content_bytes,
                "skipped": [
                    {"name": name.decode("utf-8", "backslashreplace"), "reason": reason}
                    for name, reason in summary.skipped
                ],
                "skipped_count": summary.skipped_count,
            }
        )
    elif not quiet and not to_stdout:
        files = "1 file" if summary.file_count == 1 else f"{summary.file_count} files"
        print_note(f"{files}, {show_bytes(summary.content_bytes)} -> {printable(summary.destination)}")
    if summary.skipped_count:
        if not as_json:
            for name, reason in summary.skipped:
                print_note(f"left out: {printable(name.decode('utf-8', 'backslashreplace'))}: {printable(reason)}")
            if summary.skipped_count > len(summary.skipped):
                print_note(f"left out: {summary.skipped_count - len(summary.skipped)} more")
        click.get_current_context().exit(1)
