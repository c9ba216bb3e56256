// Sends the message on standard input; how stands in the first argument (JSON). nodemailer is Debian's: node-nodemailer.
"use strict";

module.paths.push("/usr/share/nodejs");
const fs = require("fs");
const { createTransport } = require("nodemailer");

const given = JSON.parse(process.argv[2]);
const tls = { ca: fs.readFileSync(given.authorities) };
const transport = createTransport({ ...given.server, secure: false, tls });
transport
    .sendMail({ envelope: { from: given.from, to: [given.to] }, raw: fs.readFileSync(0) })
    .then((info) => process.exit(info.accepted.length === 1 ? 0 : 1))
    .catch((error) => {
        console.error(error);
        process.exit(1);
    });
